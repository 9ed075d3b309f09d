"""Benchmarks: our implementations against other implementations of the same work."""
