"""The parts of the server: endpoint, engine, scheduler."""
