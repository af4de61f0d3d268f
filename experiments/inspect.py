"""Says what a released model is and whether it loads, without its weights.

  python -m experiments.inspect FOLDER

It reads config.json and the headers of the files: family and sizes, parameters,
the formats of the weights, the memory in each dtype, and the chips that hold
it. A folder that would be refused ends with the same line and exit code 2.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import pathlib
import warnings

from rich import box
from rich.console import Console
from rich.table import Table

from mla_moe import cost
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.files import read_json
from mla_moe.hf import config_json, source

from . import chips, cli, commands

_BYTES = {'float32': 4, 'bfloat16': 2, 'FP8, int8': 1, 'int4, FP4': 0.5}
_CHIPS = ('v5e', 'v6e', 'tpu7x', 'rtx4090', 'h100', 'h200', 'b200')
_KINDS = {'fp8': 'FP8', 'fp4': 'FP4', 'uint8': 'int8, packed'}


def main() -> None:
  """Prints the report; exits with 2 where the folder would be refused."""
  parser = argparse.ArgumentParser(
    prog=commands.typed('python -m experiments.inspect'),
    description=__doc__.split('\n')[0],
  )
  parser.add_argument('folder', metavar='FOLDER')
  args = parser.parse_args()
  with cli.edge():
    show(cli.path('FOLDER', args.folder), Console())


def show(folder: pathlib.Path, console: Console) -> None:
  """Prints what is known of a folder, then what it would be refused for.

  Raises:
    ConfigError: the folder would be refused.
  """
  refusal, model, weights, notes = None, None, [], []
  with contextlib.ExitStack() as stack:
    try:
      with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        opened = source.Source(folder, config_json.F32, stack)
      model = opened.config
      weights = formats_of(opened)
      notes = [str(note.message) for note in caught]
    except ConfigError as error:
      refusal = error
  if model is None:
    with contextlib.suppress(ConfigError):
      values = read_json(source.config_path(folder))
      model = config_json.read(values, 'float32')
  if model is not None:
    console.print(_table(str(folder), facts(model, weights)))
    console.print(_memory(model))
  for note in notes:
    console.print(f'note: {note}', markup=False, highlight=False)
  if refusal:
    raise refusal


def facts(model: ModelConfig, weights: list[str]) -> list[tuple[str, str]]:
  """Returns rows of family, sizes and parameters."""
  mla, moe, counts = model.mla, model.moe, cost.parameters(model)
  rope = f'theta {mla.rope.theta:g}'
  if mla.rope.factor > 1:
    rope += f', YaRN x {mla.rope.factor:g} from {mla.rope.original_positions:,}'
  if mla.rope.query_beta:
    rope += f', queries grow by {mla.rope.query_beta:g}'
  experts = 'none'
  if model.moe_layers:
    experts = (
      f'{moe.experts} of width {moe.width:,}, {moe.top_k} a token, '
      f'{moe.shared} shared; {moe.scoring}, {moe.method}'
    )
  mtp = f', {model.mtp.depth} MTP' if model.mtp.depth else ''
  return [
    ('family', config_json.family_of(model)),
    (
      'parameters',
      f'{_short(counts.total)}, active {_short(counts.active)}'
      + (f'; MTP {_short(counts.mtp)} more' if counts.mtp else ''),
    ),
    (
      'layers',
      f'{model.layers} ({model.dense_layers} dense{mtp}), width {model.dim:,}',
    ),
    (
      'attention',
      f'{mla.heads} heads of {mla.nope_dim} + {mla.rope_dim}, values of '
      f'{mla.value_dim}; latents {mla.kv_rank}, query {mla.query_rank or "-"}',
    ),
    *_indexer(model),
    ('experts', experts),
    ('positions', f'{model.max_positions:,}; {rope}'),
    ('vocabulary', f'{model.vocab:,}{", tied" * model.tie_embeddings}'),
    ('weights', '; '.join(weights) or '-'),
  ]


def _indexer(model: ModelConfig) -> list[tuple[str, str]]:
  """Returns a row of sparse attention, none of dense attention."""
  dsa, counts = model.dsa, cost.parameters(model)
  if not dsa.heads:
    return []
  text = f'{dsa.heads} heads of {dsa.dim}, {dsa.topk:,} keys a query'
  shared = dsa.types.count('shared')
  if shared:
    text += f'; {shared} layers take the keys of the layer before'
  layout = 'neighbours' if dsa.interleaved else 'halves'
  text += f'; rotates {layout}, {_short(counts.indexer)} parameters'
  return [('indexer', text)]


def formats_of(opened: source.Source) -> list[str]:
  """Returns a text for each format in which weights are stored."""
  counts: collections.Counter = collections.Counter()
  for stored in opened.stored.values():
    entry = opened.files[stored.codes].entries[stored.codes]
    kind = _KINDS.get(stored.kind, stored.kind)
    if stored.kind == 'float':
      kind = entry.name
    elif math.prod(stored.tile) == math.prod(stored.shape[-2:]):
      kind += ' with one scale'
    else:
      kind += f' with scales of {stored.tile[0]} x {stored.tile[1]}'
    counts[kind] += math.prod(stored.shape)
  return [f'{_short(count)} in {kind}' for kind, count in counts.most_common()]


def _memory(model: ModelConfig) -> Table:
  """Returns the GiB of each dtype, and the chips of a kind that hold them."""
  counts = cost.parameters(model)
  cached = cost.cache_bytes_per_token(model) * 1024 / 2**20
  table = Table(title='chips that hold the weights', box=box.SIMPLE)
  table.caption = f'1,024 cached tokens: {cached:,.1f} MiB in bfloat16'
  for name in ('', 'GiB', *_CHIPS):
    table.add_column(name, justify='right' if name else 'left')
  for dtype, size in _BYTES.items():
    total = size * (counts.total + counts.mtp)
    needed = (chips.holding(name, total) for name in _CHIPS)
    gib = f'{total / chips.GIB:,.1f}'
    table.add_row(dtype, gib, *(f'{count:,}' for count in needed))
  return table


def _short(count: float) -> str:
  """Returns a number of parameters in three digits."""
  for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('K', 1e3)):
    if count >= size:
      return f'{count / size:.3g}{unit}'
  return str(count)


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
  table = Table(title=title, box=box.SIMPLE, show_header=False)
  table.add_column(style='bold')
  table.add_column(overflow='fold')
  for row in rows:
    table.add_row(*row)
  return table


if __name__ == '__main__':
  main()
