"""Measured time: of layers, of chains and of whole models."""
