"""CryoGEM over a session folder: its bank, its configuration, its generated data sets."""
