"""The journal, the feature cache and the output folder."""
