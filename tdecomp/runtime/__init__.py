"""How work is run: side by side, with a bar, with state that is always put back."""
