"""Large models and more workers: each part of the table in a file of its own."""
