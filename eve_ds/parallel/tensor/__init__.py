"""Tensor parallelism with megatron-core; imported only by runs whose `parallel.tp_size` is above 1."""
