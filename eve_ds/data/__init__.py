"""Data pipeline: from published files and generated scenes to masked batches of tensors."""
