"""All mathematics, on arrays and tensors; imports nothing of the service."""
