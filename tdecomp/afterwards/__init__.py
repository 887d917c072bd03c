"""What is done with a model that is decomposed: other ranks, layers again, adapters."""
