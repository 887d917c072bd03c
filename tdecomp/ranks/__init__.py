"""How much: one file for each rank selector."""
