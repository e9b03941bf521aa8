"""From a file on disk to a validated exposure."""
