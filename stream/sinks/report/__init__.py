"""The session report: what `facts.py` says of a session, as one HTML file that needs nothing else."""
