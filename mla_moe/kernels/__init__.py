"""Pallas kernels, each beside the same product in plain JAX."""
