"""Continuous batching on an unmodified transformers model: a finished answer's slot takes the next row at once."""
