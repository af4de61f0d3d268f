"""Checkpoints that notice damage: written, sealed, pruned, read again."""
