"""Experts spread over processes by DeepSpeed."""
