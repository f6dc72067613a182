"""What a chunk may see, where it stands, and how its past is kept."""
