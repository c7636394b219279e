"""Text as batches of token ids."""
