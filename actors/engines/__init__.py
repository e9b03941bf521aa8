"""Reconstruction engines behind one interface."""
