"""The table of released tensors and our leaves, read in both directions.

A row of the table is (our leaf, the released tensor, the map of its axes). The
map is read like an einsum string, with the letters of `types`:

    (n h|r) q -> q n h|r

Here the released tensor is a matrix [N (H+R), Q]: for each head n the features
h, then the features r. Our leaf has the axes [Q, N, H+R]. `h|u -> h` takes a
part of an axis. An axis in braces in the tensor's name has a tensor of its own
for each index: {l} layers, {e} experts, {g} gate and up. Features r are
rotated: a release pairs neighbours (2i, 2i + 1), our leaves pair the halves
(`rope`), so they are permuted on the way. V3.2's indexer has halves, too (a).

Every row becomes one array of indices for each axis. Loading takes with these
arrays and saving puts with them, so the two directions cannot disagree.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

from mla_moe.config import ModelConfig
from mla_moe.hf import dialects

_GATE_UP = ('gate', 'up')
_PIECE = 2**20  # numbers that are in memory at once


@dataclasses.dataclass(frozen=True)
class Row:
  """One leaf of our tree and the released tensors that it is made of.

  path: keys of the leaf in the variables. name: a template of the tensors'
  names; {l} takes the numbers in `layers`. released: the tensors' axes, one
  group for each dimension of the file. ours: the leaf's axes. sizes: (letter,
  size) of every letter. family: that spells the name. neighbours: the rotated
  letters that are so in the file. is_float32: whatever the others' dtype.

  A leaf is read and written matrix by matrix. An `index` names one matrix: its
  position along each of the `loop_axes`, such as {'l': 3, 'e': 17, 'g': 0}.
  """

  path: tuple[str, ...]
  name: str
  layers: tuple[int, ...]
  released: tuple[tuple[str, ...], ...]
  ours: tuple[str, ...]
  sizes: tuple[tuple[str, int], ...]
  family: str = ''
  neighbours: tuple[str, ...] = ('r',)
  is_float32: bool = False

  def size(self, axis: str) -> int:
    """Returns the length of an axis, the sum of its parts."""
    sizes = dict(self.sizes)
    return sum(sizes[letter] for letter in axis.split('|'))

  @functools.cached_property
  def shape(self) -> tuple[int, ...]:
    """The shape of our leaf."""
    return tuple(self.size(axis) for axis in self.ours)

  @functools.cached_property
  def file_shape(self) -> tuple[int, ...]:
    """The shape of each released tensor."""
    groups = [group for group in self.released if not self._in_name(group[0])]
    return tuple(math.prod(map(self.size, group)) for group in groups)

  def _in_name(self, axis: str) -> bool:
    return f'{{{axis}}}' in self.name

  @functools.cached_property
  def _released_axes(self) -> tuple[str, ...]:
    return tuple(axis for group in self.released for axis in group)

  @functools.cached_property
  def loop_axes(self) -> tuple[str, ...]:
    """The axes over which reading loops, so that each read is one matrix.

    They are those in the name's braces, and the experts, gate and up of a fused
    tensor, which has three dimensions.
    """
    fused = 'eg' if len(self.file_shape) > 2 else ''
    return tuple(
      axis
      for axis in self._released_axes
      if self._in_name(axis) or axis in fused
    )

  @functools.cached_property
  def _matrix_axes(self) -> tuple[str, ...]:
    return tuple(a for a in self._released_axes if a not in self.loop_axes)

  def indices(self) -> Iterator[dict[str, int]]:
    """Yields the index of each matrix."""
    ranges = (range(self.size(axis)) for axis in self.loop_axes)
    for index in itertools.product(*ranges):
      yield dict(zip(self.loop_axes, index, strict=True))

  def tensor(self, index: dict[str, int]) -> str:
    """Returns the name of the released tensor that contains a matrix."""
    layer = self.layers[index.get('l', 0)] if self.layers else 0
    gate = _GATE_UP[index.get('g', 0)]
    name = self.name.format(l=layer, e=index.get('e', 0), g=gate)
    return dialects.dialect(self.family).spell(name)

  def within(self, index: dict[str, int]) -> tuple[slice, ...]:
    """Returns the part of the tensor that is the matrix: all, if not fused."""
    slices = []
    for group in self.released:
      first = group[0]
      if self._in_name(first):
        continue
      if first not in self.loop_axes:
        slices.append(slice(None))
        continue
      step = math.prod(map(self.size, group[1:]))
      slices.append(slice(index[first] * step, (index[first] + 1) * step))
    return tuple(slices)

  @functools.cached_property
  def pieces(self) -> list[slice]:
    """The rows of a matrix in parts, but where its heads are apart."""
    first, *others = self._matrix_axes
    fused = len(self.file_shape) > 2
    if fused or (first,) not in self.released or '|' in first:
      return [slice(None)]
    step = max(1, _PIECE // math.prod(map(self.size, others)))
    return [slice(a, a + step) for a in range(0, self.size(first), step)]

  def start(
    self, index: dict[str, int], piece: slice = slice(None)
  ) -> tuple[int, ...]:
    """Returns the position in our leaf where the block of a piece begins."""
    index = {self._matrix_axes[0]: piece.start or 0} | index
    return tuple(index.get(axis, 0) for axis in self.ours)

  def _selected(self, axis: str, ours: str) -> np.ndarray | None:
    """Returns our axis's positions along a released one; None if equal."""
    if axis == ours and not {*axis.split('|')} & {*self.neighbours}:
      return None
    selected, offset = [], 0
    for letter in axis.split('|'):
      size = self.size(letter)
      positions = np.arange(size)
      if letter in self.neighbours:
        positions = np.concatenate([positions[0::2], positions[1::2]])
      if letter in ours.split('|'):
        selected.append(offset + positions)
      offset += size
    return np.concatenate(selected)

  @functools.cached_property
  def _moves(self) -> tuple[tuple[int, ...], list[tuple[int, np.ndarray]]]:
    """(order of a matrix's axes in our leaf, (axis, positions) to select)."""
    order, selections = [], []
    for ours in self.ours:
      if ours in self.loop_axes:
        continue
      axis = next(
        i
        for i, released in enumerate(self._matrix_axes)
        if set(ours.split('|')) <= set(released.split('|'))
      )
      order.append(axis)
      positions = self._selected(self._matrix_axes[axis], ours)
      if positions is not None:
        selections.append((axis, positions))
    return tuple(order), selections

  def take(self, matrix: np.ndarray) -> np.ndarray:
    """Returns our block of one matrix, a view where nothing is selected."""
    sizes = [self.size(axis) for axis in self._matrix_axes[1:]]
    x = matrix.reshape(-1, *sizes)
    order, selections = self._moves
    for axis, positions in selections:
      if (np.diff(positions) == 1).all():
        part = [slice(None)] * x.ndim
        part[axis] = slice(positions[0], positions[-1] + 1)
        x = x[tuple(part)]
      else:
        x = x.take(positions, axis)
    return np.expand_dims(x.transpose(order), self._looped_in_ours)

  def put(self, block: np.ndarray, matrix: np.ndarray) -> None:
    """Writes our block into one matrix: the inverse of `take`."""
    order, selections = self._moves
    x = np.squeeze(block, self._looped_in_ours).transpose(np.argsort(order))
    out = matrix.reshape([self.size(axis) for axis in self._matrix_axes])
    assert np.shares_memory(out, matrix) or not matrix.size
    target: list = [slice(None)] * out.ndim
    for axis, positions in selections:
      target[axis] = positions
    out[tuple(target)] = x

  @functools.cached_property
  def _looped_in_ours(self) -> tuple[int, ...]:
    """The positions of the loop axes among our leaf's axes."""
    return tuple(i for i, a in enumerate(self.ours) if a in self.loop_axes)


def quantized(name: str) -> bool:
  """Returns whether FP8 releases store this tensor in FP8.

  They do so for all matrices of the blocks, but not for the router, the norms,
  the embedding, the head, the MTP module's projection, or index heads' weights.
  """
  linear = re.search(r'(_proj|_with_mqa|indexer\.w(q_b|k))(\.weight)?$', name)
  return linear is not None and not re.search('eh_proj|weights_proj', name)


def ignored(name: str) -> bool:
  """Returns whether a release may contain the tensor for nothing (Kimi K2)."""
  return name.endswith(tuple(dialects.tables()['unused'].split()))


def is_vision(name: str) -> bool:
  """Returns whether a tensor is of the tower that reads images."""
  return name.startswith(tuple(dialects.tables()['towers'].split()))


def rows(config: ModelConfig) -> list[Row]:
  """Returns the table of a model, in the layout of its release."""
  table = _Table(config)
  table.add('top')
  if not config.tie_embeddings:
    table.add('head')
  layers, stacked = range(config.layers), 'model.layers.{l}.'
  dense, moe = layers[: config.dense_layers], layers[config.dense_layers :]
  if dense:
    table.add_block('dense.', stacked, routed=False, layers=dense)
  if moe:
    table.add_block('moe.', stacked, routed=True, layers=moe)
  for depth in range(config.mtp.depth):
    ours = f'mtp_{depth}.'
    released = f'model.layers.{config.layers + depth}.'
    table.add('mtp', ours, released)
    table.add_block(f'{ours}block.', released, routed=bool(moe))
  return table.rows


class _Table:
  """The rows of a model while they are being listed."""

  def __init__(self, config: ModelConfig):
    self.rows: list[Row] = []
    self._config, self._lines = config, dialects.tables()['tensors']
    moe, letters = config.moe, dialects.tables()['letters'].items()
    parts = {'model': config, 'mla': config.mla, 'moe': moe, 'dsa': config.dsa}
    self._sizes = dict(s=moe.shared * moe.width, g=2, k=2 * config.dim)
    self._sizes['a'] = config.mla.rope_dim
    self._sizes['b'] = config.dsa.dim - config.mla.rope_dim
    pairs = {'r': config.release.rotary == 'pairs', 'a': config.dsa.interleaved}
    self._neighbours = tuple(letter for letter in pairs if pairs[letter])
    for part, table in letters:
      for letter, field in table.items():
        self._sizes[letter] = getattr(parts[part], field)

  def add(self, part, ours='', released='', layers=(), collection='params'):
    """Adds a part of dialects.toml's `tensors`, with prefixes to both names.

    `layers`: their numbers, where the leaf is a stack of layers; its first axis
    is then l.
    """
    for path, name, axes in self._lines[part]:
      left, right = axes.split(' -> ')
      if layers:
        left, right = f'l {left}', f'l {right}'
      groups = tuple(
        tuple(group.strip('()').split())
        for group in re.findall(r'\([^)]*\)|\S+', left)
      )
      self.rows.append(
        Row(
          path=(collection, *f'{ours}{path}'.split('.')),
          name=f'{released}{name}',
          layers=tuple(layers),
          released=groups,
          ours=tuple(right.split()),
          sizes=tuple({**self._sizes, 'l': len(layers)}.items()),
          family=self._config.release.family,
          neighbours=self._neighbours,
          is_float32=collection == 'router' or 'key_norm' in path,
        )
      )

  def add_block(self, ours: str, released: str, routed: bool, layers=()):
    """Adds one block, or a stack of `layers` blocks."""
    add, moe = functools.partial(self.add, layers=layers), self._config.moe
    add('block', ours, released)
    query = 'query_latent' if self._config.mla.query_rank else 'query'
    for part in (query, 'attention'):
      add(part, f'{ours}attention.', f'{released}self_attn.')
    dsa = self._config.dsa  # l counts the layers that have an indexer
    full = tuple(l for l in layers if dsa.types[l : l + 1] != ('shared',))
    if dsa.heads and (full or not layers):
      for part in ('indexer', f'indexer_{dsa.q_from}'):
        self.add(part, f'{ours}attention.', f'{released}self_attn.', full)
    ours, released = f'{ours}ffn.', f'{released}mlp.'
    if not routed:
      add('dense', ours, released)
      return
    add('router', ours, released)
    if moe.method == 'noaux_tc':
      add('bias', ours, released, collection='router')
    add(f'experts_{self._config.release.experts}', ours, released)
    if moe.shared:
      add('shared', ours, released)


def copies(config: ModelConfig) -> dict[str, str]:
  """Returns {tensor: the tensor that it must equal}: MTP's embedding and head.

  A model whose head is its embedding may have the head in its files, too.
  """
  embedding, originals = 'model.embed_tokens.weight', {}
  for layer in range(config.layers, config.layers + config.mtp.depth):
    for name, original in dialects.tables()['copies'].items():
      original = embedding if config.tie_embeddings else original
      originals[f'model.layers.{layer}.{name}'] = original
  if config.tie_embeddings:
    originals['lm_head.weight'] = embedding
  say = dialects.dialect(config.release.family).spell
  return {say(name): say(original) for name, original in originals.items()}
