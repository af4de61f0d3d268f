"""Text from a model: latent cache, absorbed attention, sampling."""
