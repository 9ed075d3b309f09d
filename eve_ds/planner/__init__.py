"""Memory and traffic of a model on a number of GPUs, counted without a GPU and without DeepSpeed."""
