"""What each layer sees in unlabelled batches."""
