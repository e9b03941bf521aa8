"""Movie alignment and dose-weighted sums."""
