"""The training step: losses, optimizer, state."""
