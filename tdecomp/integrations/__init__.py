"""Other libraries taught to load what tdecomp saved; each file here is imported by its users."""
