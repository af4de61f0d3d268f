"""The front door: what a config needs, costs and takes, before it is run."""
