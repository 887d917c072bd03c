"""The choice as data: rows, tables and plans."""
