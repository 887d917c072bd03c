"""Other libraries taught to save and load chains; what loads is imported by its users."""
