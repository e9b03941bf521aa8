"""CryoRanker: losses, training and the shipped default model."""
