"""Frozen weights of eight or four bits, and the adapters trained over them."""
