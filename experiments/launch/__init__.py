"""Runs on machines that are not here: each backend is a list of commands."""
