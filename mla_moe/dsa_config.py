"""The numbers of DeepSeek Sparse Attention's indexer (V3.2, section 2.1)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mla_moe.checked import Checked, ConfigError


@dataclasses.dataclass(frozen=True)
class DSAConfig(Checked):
  """The lightning indexer (`model.indexer`); 0 `heads` is dense attention.

  A query attends to the `topk` keys with the highest index scores. The indexer
  has `heads` of `dim` features, of which the first (`rope_first`) or the last
  `mla.rope_dim` are rotated. Its queries come `q_from` the normed latent of
  MLA's queries or the stream. A 'shared' layer has no indexer and takes the set
  of the last 'full' one; `types` () are full alone. If `interleaved`, rotated
  features are neighbours in a release, and loading makes them halves. With
  'dense' `attention` a query attends to all keys, for the indexer's warm-up.
  """

  heads: int = 0
  dim: int = 128
  topk: int = 2048
  rope_first: bool = True
  interleaved: bool = False
  k_norm_eps: float = 1e-6
  q_from: Literal['latent', 'x'] = 'latent'
  types: tuple = ()
  attention: Literal['sparse', 'dense'] = 'sparse'

  def _rules(self):
    self._positive('dim', 'topk')
    self._require('k_norm_eps', self.k_norm_eps > 0, 'must be above 0')
    known = {*self.types} <= {'full', 'shared'}
    self._require('types', known, 'each is full or shared, one a layer')
    first = self.types[:1] in ((), ('full',))
    self._require('types', first, "the first layer must be 'full'")
    rule = 'layers share the sets of an indexer; set heads, or types=()'
    self._require('types', self.heads > 0 or not self.types, rule)

  def check(self, model: Checked):
    """Raises a ConfigError where a ModelConfig does not fit."""
    wrong, rotary = '', model.mla.rope_dim
    if self.dim < rotary:
      wrong = f'dim={self.dim}: must not be below mla.rope_dim={rotary}'
    elif self.q_from == 'latent' and not model.mla.query_rank:
      wrong = "q_from='latent': mla.query_rank=0; set dsa.q_from='x'"
    elif len(self.types) not in (0, model.layers):
      wrong = f'types={self.types!r}: must be one for each of {model.layers=}'
    if self.heads and wrong:
      raise ConfigError(f'dsa.{wrong}')

  def check_training(self, optim: Checked):
    """Raises a ConfigError where an OptimConfig would train nothing."""
    if optim.trains == 'indexer' and not (self.heads and optim.index_loss):
      rule = 'needs model.dsa.heads and optim.index_loss above 0'
      raise ConfigError(f"optim.trains='indexer': {rule}")
