"""What is done with a finished decomposition."""
