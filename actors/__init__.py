"""Where computation runs: the only package that calls Ray."""
