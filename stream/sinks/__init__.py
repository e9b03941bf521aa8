"""Exports: RELION STAR, CryoSPARC .cs, pictures, reports."""
