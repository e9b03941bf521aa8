"""CryoGEM: annotated micrographs that look like a session's, from its map and its micrographs."""
