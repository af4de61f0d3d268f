"""Notebooks: percent-format sources, and the .ipynb made from them."""
