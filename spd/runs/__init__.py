"""A run as a directory: beginning, going on, recording and loading it."""
