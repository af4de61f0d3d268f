"""Programs: the only place with flags, files, clocks and loops."""
