"""Training on other machines: each backend gives a list of commands."""
