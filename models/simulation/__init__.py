"""The virtual specimen and microscope."""
