"""Everyone's transformer files, read into one form; and our own checkpoints."""
