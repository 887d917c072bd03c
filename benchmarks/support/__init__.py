"""What the commands share: models, data, timing, tables and pictures."""
