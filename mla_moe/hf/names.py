"""Where each number of a released checkpoint stands in our tree: one table.

A row is (ours, the released tensor's name, how its axes map). The last is read
like einsum's letters, which are those of `types`:

    (n h|r) q -> q n h|r

The released tensor is a matrix with a row for each head n and each of the
head's h + r features, and q columns; ours has the axes q, n, h + r. `h|u -> h`
takes a part of an axis. An axis that stands in braces in the name has a tensor
for each of its places: {l} layers, {e} experts, {g} gate and up. Features r are
rotated: a release pairs neighbours, (2i, 2i + 1), ours the halves (`rope`).

A row becomes one index array for each axis, with which loading takes and
saving puts: the two directions cannot disagree.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from mla_moe.config import ModelConfig

_GATE_UP = ('gate', 'up')

# ours, released, axes
_TOP = (
  ('embedding', 'model.embed_tokens.weight', 'v d -> v d'),
  ('final_norm.scale', 'model.norm.weight', 'd -> d'),
)
_HEAD = (('w_head', 'lm_head.weight', 'v d -> d v'),)
_BLOCK = (
  ('attention_norm.scale', 'input_layernorm.weight', 'd -> d'),
  ('ffn_norm.scale', 'post_attention_layernorm.weight', 'd -> d'),
)
_ATTENTION = (
  ('w_kv_down', 'kv_a_proj_with_mqa.weight', 'c|r d -> d c'),
  ('w_k_rope', 'kv_a_proj_with_mqa.weight', 'c|r d -> d r'),
  ('kv_norm.scale', 'kv_a_layernorm.weight', 'c -> c'),
  ('w_k_up', 'kv_b_proj.weight', '(n h|u) c -> c n h'),
  ('w_v_up', 'kv_b_proj.weight', '(n h|u) c -> c n u'),
  ('w_out', 'o_proj.weight', 'd (n u) -> n u d'),
)
_QUERY = (('w_q', 'q_proj.weight', '(n h|r) d -> d n h|r'),)
_QUERY_LATENT = (
  ('w_q_down', 'q_a_proj.weight', 'q d -> d q'),
  ('q_norm.scale', 'q_a_layernorm.weight', 'q -> q'),
  ('w_q_up', 'q_b_proj.weight', '(n h|r) q -> q n h|r'),
)
_DENSE = (
  ('w_gate_up', '{g}_proj.weight', 'g i d -> d g i'),
  ('w_down', 'down_proj.weight', 'd i -> i d'),
)
_ROUTER = (('w_router', 'gate.weight', 'e d -> d e'),)
_BIAS = (('bias', 'gate.e_score_correction_bias', 'e -> e'),)
_SHARED = (
  ('shared.w_gate_up', 'shared_experts.{g}_proj.weight', 'g s d -> d g s'),
  ('shared.w_down', 'shared_experts.down_proj.weight', 'd s -> s d'),
)
_EXPERTS = (
  ('w_gate_up', 'experts.{e}.{g}_proj.weight', 'e g f d -> e d g f'),
  ('w_down', 'experts.{e}.down_proj.weight', 'e d f -> e f d'),
)
# As transformers 5 holds them in memory, and some of its files.
_FUSED_EXPERTS = (
  ('w_gate_up', 'experts.gate_up_proj', 'e (g f) d -> e d g f'),
  ('w_down', 'experts.down_proj', 'e d f -> e f d'),
)
_MTP = (
  ('embed_norm.scale', 'enorm.weight', 'd -> d'),
  ('hidden_norm.scale', 'hnorm.weight', 'd -> d'),
  ('w_join', 'eh_proj.weight', 'd k -> k d'),
  ('final_norm.scale', 'shared_head.norm.weight', 'd -> d'),
)
# What an MTP layer repeats of the main model, and which row it repeats.
COPIES = {
  'embed_tokens.weight': 'model.embed_tokens.weight',
  'shared_head.head.weight': 'lm_head.weight',
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A leaf of our tree and the released tensors that it is made of.

  path: keys of the leaf in the variables. name: a template; `layers` are the
  numbers that its {l} takes. released: the tensor's axes, one group a dimension
  of the file. ours: the leaf's axes. sizes: of every letter, (letter, size).
  """

  path: tuple[str, ...]
  name: str
  layers: tuple[int, ...]
  released: tuple[tuple[str, ...], ...]
  ours: tuple[str, ...]
  sizes: tuple[tuple[str, int], ...]

  def size(self, axis: str) -> int:
    """The length of an axis: of all its parts."""
    sizes = dict(self.sizes)
    return sum(sizes[letter] for letter in axis.split('|'))

  @functools.cached_property
  def shape(self) -> tuple[int, ...]:
    """The shape of our leaf."""
    return tuple(self.size(axis) for axis in self.ours)

  @functools.cached_property
  def file_shape(self) -> tuple[int, ...]:
    """The shape of each released tensor."""
    groups = [
      group for group in self.released if f'{{{group[0]}}}' not in self.name
    ]
    return tuple(math.prod(map(self.size, group)) for group in groups)

  @functools.cached_property
  def units(self) -> tuple[str, ...]:
    """The axes that are read place by place, so that a read is a matrix.

    Those in the name's braces, and those of a fused tensor, which has three
    dimensions.
    """
    fused = 'eg' if len(self.file_shape) > 2 else ''
    flat = [axis for group in self.released for axis in group]
    return tuple(a for a in flat if f'{{{a}}}' in self.name or a in fused)

  @functools.cached_property
  def _core(self) -> tuple[str, ...]:
    flat = [axis for group in self.released for axis in group]
    return tuple(axis for axis in flat if axis not in self.units)

  def places(self) -> Iterator[dict[str, int]]:
    """The places of the unit axes, one for each matrix to read."""
    ranges = (range(self.size(axis)) for axis in self.units)
    for at in itertools.product(*ranges):
      yield dict(zip(self.units, at, strict=True))

  def tensor(self, at: dict[str, int]) -> str:
    """The name of the released tensor of a place."""
    layer = self.layers[at.get('l', 0)] if self.layers else 0
    gate = _GATE_UP[at.get('g', 0)]
    return self.name.format(l=layer, e=at.get('e', 0), g=gate)

  def within(self, at: dict[str, int]) -> tuple[slice, ...]:
    """Where in a fused tensor a place's matrix stands; all of it otherwise."""
    slices = []
    for group in self.released:
      if f'{{{group[0]}}}' in self.name:
        continue
      first = group[0]
      if first not in self.units:
        slices.append(slice(None))
        continue
      step = math.prod(map(self.size, group[1:]))
      slices.append(slice(at[first] * step, (at[first] + 1) * step))
    return tuple(slices)

  def start(self, at: dict[str, int]) -> tuple[int, ...]:
    """Where in our leaf a place's block begins."""
    return tuple(at.get(axis, 0) for axis in self.ours)

  def _index(self, core: str, ours: str) -> np.ndarray | None:
    """The released positions along `core` of our positions along `ours`."""
    if core == ours and 'r' not in core.split('|'):
      return None
    found, at = [], 0
    for letter in core.split('|'):
      size = self.size(letter)
      places = np.arange(size)
      if letter == 'r':
        places = np.concatenate([places[0::2], places[1::2]])
      if letter in ours.split('|'):
        found.append(at + places)
      at += size
    return np.concatenate(found)

  @functools.cached_property
  def _moves(self) -> tuple[tuple[int, ...], list[tuple[int, np.ndarray]]]:
    """The order of the core axes in ours, and (axis, index) where one moves."""
    wanted = [axis for axis in self.ours if axis not in self.units]
    order, indices = [], []
    for axis in wanted:
      at = next(
        i
        for i, core in enumerate(self._core)
        if set(axis.split('|')) <= set(core.split('|'))
      )
      order.append(at)
      index = self._index(self._core[at], axis)
      if index is not None:
        indices.append((at, index))
    return tuple(order), indices

  def take(self, matrix: np.ndarray, plain_rope: bool = False) -> np.ndarray:
    """Our block of one place's matrix; a view where nothing is selected.

    `plain_rope`: the rotated rows are already in halves.
    """
    x = matrix.reshape([self.size(axis) for axis in self._core])
    order, indices = self._moves
    for axis, index in indices:
      index = np.sort(index) if plain_rope else index
      if (np.diff(index) == 1).all():
        part = [slice(None)] * x.ndim
        part[axis] = slice(index[0], index[-1] + 1)
        x = x[tuple(part)]
      else:
        x = x.take(index, axis)
    x = x.transpose(order)
    unit = [i for i, axis in enumerate(self.ours) if axis in self.units]
    return np.expand_dims(x, unit)

  def put(self, block: np.ndarray, matrix: np.ndarray) -> None:
    """Writes our block into one place's matrix: `take` backwards."""
    unit = [i for i, axis in enumerate(self.ours) if axis in self.units]
    order, indices = self._moves
    x = np.squeeze(block, tuple(unit)).transpose(np.argsort(order))
    out = matrix.reshape([self.size(axis) for axis in self._core])
    assert np.shares_memory(out, matrix) or not matrix.size
    where: list = [slice(None)] * out.ndim
    for axis, index in indices:
      where[axis] = index
    out[tuple(where)] = x


def quantized(name: str) -> bool:
  """Whether FP8 releases hold this tensor in FP8: all matrices of the blocks.

  Not the router, the norms, the embedding, the head, nor MTP's projection.
  """
  linear = re.search(r'_proj(_with_mqa)?(\.weight)?$', name)
  return linear is not None and 'eh_proj' not in name


def ignored(name: str) -> bool:
  """Tensors that a release may hold and that mean nothing (Kimi K2's)."""
  return name.endswith('.rotary_emb.inv_freq')


def rows(config: ModelConfig, fused_experts: bool = False) -> list[Row]:
  """The table of a model; `fused_experts` as transformers 5 may hold them."""
  mla, moe = config.mla, config.moe
  sizes = dict(
    v=config.vocab,
    d=config.dim,
    i=config.dense_width,
    n=mla.heads,
    q=mla.query_rank,
    c=mla.kv_rank,
    h=mla.nope_dim,
    r=mla.rope_dim,
    u=mla.value_dim,
    e=moe.experts,
    f=moe.width,
    s=moe.shared * moe.width,
    g=2,
    k=2 * config.dim,
  )
  found = []

  def add(lines, ours='', released='', layers=(), scan=False, router=False):
    for path, name, axes in lines:
      left, right = axes.split(' -> ')
      if scan:
        left, right = f'l {left}', f'l {right}'
      groups = tuple(
        tuple(group.strip('()').split())
        for group in re.findall(r'\([^)]*\)|\S+', left)
      )
      keys = f'{ours}{path}'.split('.')
      found.append(
        Row(
          path=('router' if router else 'params', *keys),
          name=f'{released}{name}',
          layers=tuple(layers),
          released=groups,
          ours=tuple(right.split()),
          sizes=tuple({**sizes, 'l': len(layers)}.items()),
        )
      )

  def block(ours, layers, routed, scan):
    at = 'model.layers.{l}.' if scan else f'model.layers.{layers[0]}.'
    layers = layers if scan else ()
    put = functools.partial(add, layers=layers, scan=scan)
    put(_BLOCK, ours, at)
    query = _QUERY_LATENT if mla.query_rank else _QUERY
    put(query + _ATTENTION, f'{ours}attention.', f'{at}self_attn.')
    ours, at = f'{ours}ffn.', f'{at}mlp.'
    if not routed:
      put(_DENSE, ours, at)
      return
    put(_ROUTER, ours, at)
    if moe.method == 'noaux_tc':
      put(_BIAS, ours, at, router=True)
    put(_FUSED_EXPERTS if fused_experts else _EXPERTS, ours, at)
    if moe.shared:
      put(_SHARED, ours, at)

  add(_TOP)
  if not config.tie_embeddings:
    add(_HEAD)
  every = range(config.layers)
  if config.dense_layers:
    block('dense.', every[: config.dense_layers], routed=False, scan=True)
  if config.moe_layers:
    block('moe.', every[config.dense_layers :], routed=True, scan=True)
  for depth in range(config.mtp.depth):
    layer = config.layers + depth
    add(_MTP, f'mtp_{depth}.', f'model.layers.{layer}.')
    routed = config.moe_layers > 0
    block(f'mtp_{depth}.block.', [layer], routed=routed, scan=False)
  return found


def copies(config: ModelConfig) -> dict[str, str]:
  """Name -> name of the tensor that it must equal: MTP's embedding and head.

  A model whose head is its embedding may have the head in its files, too.
  """
  tied = config.tie_embeddings
  found = {}
  for depth in range(config.mtp.depth):
    for name, original in COPIES.items():
      if tied:
        original = COPIES['embed_tokens.weight']
      found[f'model.layers.{config.layers + depth}.{name}'] = original
  if tied:
    found['lm_head.weight'] = COPIES['embed_tokens.weight']
  return found


def flat(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Any]]:
  """(path, leaf) of every leaf of nested mappings; paths are those of rows."""
  if not hasattr(tree, 'items'):
    yield keys, tree
    return
  for key, value in tree.items():
    yield from flat(value, (*keys, key))
