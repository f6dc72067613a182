"""What a user calls: generate, stream and export. Nothing is imported until it is used."""
