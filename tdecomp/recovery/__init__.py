"""Getting accuracy back without labels."""
