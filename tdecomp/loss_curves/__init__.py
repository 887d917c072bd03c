"""What each layer loses at each rank."""
