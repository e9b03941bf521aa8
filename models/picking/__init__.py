"""Particle picking and extraction."""
