"""Tensor parallelism with megatron-core; imported only by runs whose `parallel.tp_size` is above 1."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it reports the lack of packages that only its own optimizers use
    import megatron.core  # noqa: F401

warnings.filterwarnings("ignore", "When using async grad allreduce")  # docs/tensor_parallelism.md has this advice
