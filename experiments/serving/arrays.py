"""The arrays of a server on the device, which its programs take and return.

The programs are functions that get the pools of pages, `seen` and `hidden` for
themselves (donated) and return the next ones. This class holds them between two
calls. After an error in a program they may be gone: `is_lost` says so, and
`clear` makes them again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe.config import CacheConfig, ModelConfig
from mla_moe.decode import forward, latent_cache
from mla_moe.types import Array, PyTree

from . import programs
from .group import Group


class Arrays:
  """Weights, pools and the state of rows.

  Args:
    config: of the model.
    variables: {'params', 'router'}, or the weights that `forward.unstack` makes
      of them.
    rows: samples that decode at once.
    pages: of the pool, page 0 among them.
    cache: type and page size of the latent cache.
    drafts: MTP modules that draft, 0 or 1.
  """

  def __init__(
    self,
    config: ModelConfig,
    variables: PyTree,
    rows: int,
    pages: int,
    cache: CacheConfig,
    drafts: int,
  ):
    self._config, self._rows = config, rows
    self._layers = config.layers + drafts
    self._impl = latent_cache.implementation(cache)
    make = functools.partial(latent_cache.pools, config, pages, cache)
    self._make_pools = jax.jit(make)
    self.clear()
    self.load(variables)

  def load(self, variables: PyTree) -> None:
    """Takes other weights, in either form."""
    self._weights = forward.layer_weights(self._config, variables)

  def clear(self) -> None:
    """Makes the arrays of rows without samples, and of an empty cache."""
    config = self._config
    self._pools = self._seen = self._hidden = None  # frees the memory first
    self._pools = self._make_pools()[: self._layers]
    self._seen = jnp.zeros((self._rows, config.vocab), bool)
    self._hidden = jnp.zeros((self._rows, 2, config.dim), config.dtype)

  @property
  def is_lost(self) -> bool:
    """Whether a program has taken an array and returned none."""
    arrays = jax.tree.leaves((self._pools, self._seen, self._hidden))
    return any(array.is_deleted() for array in arrays)

  def prefill(
    self, chunk: programs.Chunk
  ) -> tuple[Array, Array, programs.Scores]:
    """Returns logits, hidden state and scores of a chunk (`prefill`)."""
    logits, hidden, scores, self._pools = programs.prefill(
      self._weights, self._pools, chunk, config=self._config, impl=self._impl
    )
    return logits, hidden, scores

  def first_token(
    self, row: int, group: Group, length: int, knobs
  ) -> programs.Emitted:
    """Returns the token after a prompt, for the sample of a row.

    Args:
      row: of the sample.
      group: with its whole prompt in the cache.
      length: of a row, so that there is one program for all prompts.
      knobs: of the sample.
    """
    prompt = np.full(length, self._config.vocab, np.int32)
    prompt[: len(group.ids)] = group.ids
    emitted, self._seen, self._hidden = programs.first_token(
      group.logits,
      group.hidden,
      self._seen,
      self._hidden,
      np.int32(row),
      prompt,
      np.array([len(group.ids)], np.int32),
      np.bool_(group.alternatives),
      knobs,
    )
    return jax.device_get(emitted)

  def decode(self, rows: programs.Rows) -> programs.Emitted:
    """Returns the next tokens of all rows."""
    emitted, self._pools, self._seen, self._hidden = programs.decode(
      self._weights,
      self._pools,
      self._seen,
      self._hidden,
      # Copies: the program may still read them when the rows change.
      jax.tree.map(np.array, rows),
      config=self._config,
      impl=self._impl,
    )
    return jax.device_get(emitted)

  def copy_page(self, source: int, target: int) -> None:
    """Writes page `source` over page `target`."""
    self._pools = programs.copy_page(
      self._pools, np.int32(source), np.int32(target)
    )

  def routes(self, rows: programs.Rows, row: int) -> np.ndarray:
    """Returns the experts of a row's tokens in the cache, [S, L, K]."""
    one = slice(row, row + 1)
    pages = rows.table[one], rows.lengths[one]
    return np.asarray(programs.routes(self._pools, *pages))[0]
