"""The decoding benchmark: speed beside a peer, the cache, long contexts.

The peer is transformers' DeepSeek-V3 (static cache, compiled; and plain), at
the training benchmark's shape after 512 tokens of context and in turns with
ours. The floor of a step is its reading: the weights of the experts that its
rows chose and the rows' latents, at the bandwidth of a copy on the same
machine.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys

import numpy as np

from mla_moe import cost
from mla_moe.config import ModelConfig

from .. import page, runtime
from . import contender, layer, models, ours_decode, show

# tokens/s at batch 1 and 8 that others reached once on two cores, medians.
OTHERS = {
  'EasyDeL 0.3.0, every expert': (287, 488),
  'MaxText 0.2.5, every expert': (112, 244),
  'jax-llm-examples': (46, 312),
}

_STEPS = 64
_BATCHES = (1, 8)
_CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclasses.dataclass(frozen=True)
class _Job(models.Shape):
  """A shape with the tokens that are decoded after `length` of context."""

  steps: int = _STEPS


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  parser.add_argument('--only', default='', help='parts, joined by commas')
  parser.add_argument('--rounds', type=int, default=7, help='turns of each')
  parser.add_argument(
    '--peer_python',
    default=sys.executable,
    help='a Python with torch and transformers',
  )


def run(out: pathlib.Path, args) -> None:
  """Measures the parts of `args.only`, prints them, writes OUT/decode.html."""
  runtime.keep_memory()
  parts = {
    'speed': lambda: _speed(args.peer_python, args.rounds),
    'cache': cache_table,
    'layer': lambda: layer.measure(_BATCHES, args.rounds),
    'context': lambda: _by_context(args.rounds),
  }
  results = show.measure(out / 'decode.json', parts, args.only)
  show.results(
    out,
    'decode',
    'Decoding benchmark',
    rows(results),
    show.machines(results),
    lambda: draw(results),
  )


# ------------------------------------------------------------------- measuring


def step_bytes(
  shape: models.Shape, context: int, dtype: str = 'float32'
) -> float:
  """Returns bytes that a step must read: weights in use and latents.

  Of the routed experts these are the ones that `batch` rows choose when each is
  as likely as any other.
  """
  config = models.config(shape).model
  counts = cost.parameters(config)
  expert = 3 * shape.dim * shape.width
  missed = (1 - shape.top_k / shape.experts) ** shape.batch
  chosen = shape.experts * (1 - missed) * config.moe_layers * expert
  rest = counts.total - counts.routed - counts.embedding
  rows = shape.batch * context * cost.cache_bytes_per_token(config, dtype)
  return np.dtype(dtype).itemsize * (rest + chosen) + rows


def _speed(python: str, rounds: int) -> dict:
  racers = {}
  for batch in _BATCHES:
    job = _Job(batch=batch)
    racers['mla_moe', batch] = contender.ours('ours_decode', job, 'float32')
    for mode in ('static compile', 'plain'):
      peer = contender.peer(python, 'peer_decode', job, mode)
      racers[f'transformers, {mode}', batch] = peer
  racers = contender.started(racers)
  contender.take_turns(racers, rounds)
  bandwidth = layer.copy_bandwidth()
  rates = []
  for (name, batch), racer in racers.items():
    prefill, steps = np.array(racer.seconds).T
    rate = batch * _STEPS / steps
    read = step_bytes(_Job(batch=batch), _Job.length + _STEPS // 2)
    rates.append(
      {
        'name': name,
        'batch': batch,
        'tokens_per_s': float(np.median(rate)),
        'fastest': float(rate.max()),
        'prefill': float(batch * _Job.length / np.median(prefill)),
        'fraction': float(read * _STEPS / np.median(steps) / bandwidth),
        'versions': racer.versions,
      }
    )
  return {'rates': rates, 'bandwidth': bandwidth}


def cache_table() -> list[dict]:
  """Returns bytes a token and layer, bfloat16, for three kinds of cache."""
  small = models.config(models.Shape()).model
  table = []
  for name, model in {
    'DeepSeek-V3': ModelConfig(),
    'this shape': small,
  }.items():
    mla = model.mla
    head = mla.nope_dim + mla.rope_dim + mla.value_dim
    table.append(
      {
        'model': name,
        'every head': 2 * mla.heads * head,
        '8 heads (GQA)': 2 * 8 * 2 * mla.nope_dim,
        'latent (MLA)': cost.cache_bytes_per_token(model) // model.layers,
      }
    )
  return table


def _by_context(rounds: int) -> dict:
  """Returns, by the tokens before it, a step's ms at batch 1, and its floor."""
  import jax.numpy as jnp

  from mla_moe.decode import latent_cache

  config = models.config(models.Shape()).model
  weights = ours_decode.weights(config)
  step = ours_decode.step_function(config)
  state = {
    'cache': latent_cache.empty(config, 1, max(_CONTEXTS) + 128),
    'tokens': jnp.zeros(1, jnp.int32),
  }

  def step_after(context):
    cache = state['cache'].replace(lengths=jnp.full(1, context, jnp.int32))
    state['tokens'], state['cache'] = step(weights, cache, state['tokens'])
    state['tokens'].block_until_ready()

  calls = {c: functools.partial(step_after, c) for c in _CONTEXTS}
  seconds = layer.in_turns(calls, rounds, times=20)
  first = min(_CONTEXTS)
  token = cost.cache_bytes_per_token(config, 'float32')
  per_token = token / layer.copy_bandwidth()
  return {
    context: {
      'ms': 1e3 * measured,
      'floor_ms': 1e3 * (seconds[first] + (context - first) * per_token),
    }
    for context, measured in seconds.items()
  }


# --------------------------------------------------------------------- showing


def rows(results: dict) -> list[tuple[str, str, str]]:
  """Returns (figure, its value, a figure to compare it with), in order."""
  figures = {name: part['figures'] for name, part in results.items()}
  rows = []
  if 'speed' in figures:
    rows += _speed_rows(figures['speed']['rates'])
  for one in figures.get('cache', []):
    kinds = ', '.join(f'{k}: {v:,}' for k, v in one.items() if k != 'model')
    rows.append((f'cache of {one["model"]}', kinds, 'B a token and layer'))
  for batch, one in figures.get('layer', {}).items():
    ms = (
      f'{1e3 * one["latent"]:.2f} ms, {one["fraction"]:.0%} of copy bandwidth'
    )
    beside = f'per-head cache {one["heads"] / one["latent"]:.1f}x'
    rows.append((f'absorbed layer, batch {batch}', ms, beside))
  for context, one in figures.get('context', {}).items():
    beside = f'512 plus reading the latents: {one["floor_ms"]:.2f}'
    rows.append((f'a token after {context}', f'{one["ms"]:.2f} ms', beside))
  return rows


def _speed_rows(rates):
  for one in rates:
    beside = f'best {one["fastest"]:.0f}, prefill {one["prefill"]:,.0f}'
    if one['name'] == 'mla_moe':
      beside += f', {one["fraction"]:.0%} of copy bandwidth ({one["versions"]})'
    name = f'{one["name"]}, batch {one["batch"]}'
    yield name, f'{one["tokens_per_s"]:.0f} tokens/s', beside
  for name, values in OTHERS.items():
    yield f'{name}, once', ' and '.join(map(str, values)), 'batch 1 and 8'


def draw(results: dict):
  """Returns a figure of a step's time by context, or None without that part."""
  if 'context' not in results:
    return None
  by_context = results['context']['figures']
  contexts = [int(context) for context in by_context]
  measured = [one['ms'] for one in by_context.values()]
  floor = [one['floor_ms'] for one in by_context.values()]
  figure, axes = page.figure(1, height=3.2)
  plot = axes.flat[0]
  plot.plot(contexts, measured, 'o-', label='measured')
  plot.plot(contexts, floor, ':', label='512, and reading the latents')
  plot.set(title='A token', xlabel='tokens before it', ylabel='ms')
  plot.set_ylim(0, None)
  plot.legend(frameon=False)
  return figure
