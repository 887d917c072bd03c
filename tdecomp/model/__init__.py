"""What a model is: its layers, how it runs, how layers are replaced."""
