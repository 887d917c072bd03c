"""The smallest model that keeps a quality."""
