"""Plain PyTorch weights, out of a run and back into a model."""
