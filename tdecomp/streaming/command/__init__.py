"""The command line: the words that it takes, its help, and what it shows."""
