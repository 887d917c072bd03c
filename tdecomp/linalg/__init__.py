"""Factorizations: tensors in, tensors out."""
