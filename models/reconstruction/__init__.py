"""Initial model, refinement and orientation diagnostics."""
