"""Frozen values and their vocabulary; standard library alone."""
