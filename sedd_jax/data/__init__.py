"""Text: where it comes from, how it becomes tokens, and batches of them."""
