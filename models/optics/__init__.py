"""Contrast transfer, dose and the electron wavelength."""
