"""The Wan2.1 transformer, bidirectional and causal in one class, with maps to every public checkpoint format."""
