"""A decomposed model in one file, or in a folder as Hugging Face's libraries have, and back."""
