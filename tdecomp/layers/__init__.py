"""What a layer is, without a model: its sizes, its chain, its cost."""
