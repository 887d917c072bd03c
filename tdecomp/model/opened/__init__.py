"""Modules that hold weights of their own, opened: what these weights do becomes layers in them."""
