"""Checkpoints that notice damage: store, seal, fingerprint."""
