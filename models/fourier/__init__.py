"""Fourier transforms, resampling and shell statistics."""
