"""What lies in a single file: its tensors, read one by one, and what they are."""
