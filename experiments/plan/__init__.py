"""A config's memory, traffic, time and money, before it is run."""
