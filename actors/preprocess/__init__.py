"""Preprocessing of one exposure, a module per stage."""
