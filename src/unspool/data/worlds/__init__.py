"""Worlds that are rendered on demand, with captions and exact truth."""
