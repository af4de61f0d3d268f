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
  `mla.rope_dim` are rotated. Its queries come from the normed latent of MLA's
  queries or from the stream, `q_from`. A layer of type 'shared' has no indexer
  and takes the set of the last 'full' layer; `types` () are full layers alone.
  `interleaved` is the order of rotated features in a release: neighbours, which
  are permuted to halves when they are loaded, or halves. With 'dense'
  `attention` a query attends to all keys, for the indexer's warm-up.
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
    self._require(
      'types',
      all(kind in ('full', 'shared') for kind in self.types),
      'each is full or shared, one a layer; () are full layers alone',
    )
    self._require(
      'types',
      not self.types or self.types[0] == 'full',
      "the first layer must be 'full': no layer before it has a set",
    )
    self._require(
      'types',
      self.heads > 0 or not self.types,
      'layers share the sets of an indexer; set heads or leave types empty',
    )

  def check(self, model: Checked):
    """Raises a ConfigError where a ModelConfig does not fit."""
    rotary, rank = model.mla.rope_dim, model.mla.query_rank
    wrong = ''
    if self.heads and self.dim < rotary:
      wrong = (
        f'dim={self.dim}: must not be below mla.rope_dim={rotary}, the '
        'features that are rotated'
      )
    if self.heads and self.q_from == 'latent' and not rank:
      wrong = (
        "q_from='latent': mla.query_rank=0 is a query without a latent; set "
        "dsa.q_from='x'"
      )
    if self.types and len(self.types) != model.layers:
      wrong = (
        f'types={self.types!r}: must be one for each of layers='
        f'{model.layers}, not {len(self.types)}'
      )
    if wrong:
      raise ConfigError(f'dsa.{wrong}')

  @property
  def shares(self) -> bool:
    return 'shared' in self.types
