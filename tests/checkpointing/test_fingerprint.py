"""Fingerprints: a flipped bit or a moved element changes the number."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checkpointing import fingerprint


@pytest.mark.parametrize('bit', [0, 15, 31])
def test_any_bit_of_any_element_changes_the_fingerprint(bit):
  x = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
  of = lambda x: fingerprint.read(fingerprint.of({'x': jnp.asarray(x)}))[0]['x']
  before = of(x)
  for at in (0, 50, 104):
    y = x.copy()
    y.reshape(-1).view(np.uint32)[at] ^= np.uint32(1 << bit)
    assert of(y) != before
  assert of(x.swapaxes(0, 2).reshape(x.shape)) != before
