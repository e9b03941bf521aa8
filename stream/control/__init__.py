"""The controller: events in, commands out."""
