"""Ideas that are no part of the library: a folder each, with its ablation.

An idea copies any code of the library and changes it. Nothing imports it, and
`python -m experiments.ablate --name=FOLDER` compares it with the library's way.
"""
