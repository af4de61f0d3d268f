"""Hugging Face folders, read into variables and written from them."""
