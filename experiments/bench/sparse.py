"""Sparse attention (DSA) beside dense: training at length, decoding, a peer.

`training` is a step of a model of one layer, sparse and dense, at several
lengths: its time, and the memory of its temporary arrays, which the compiler
says. `decoding` is a token after a long context: a whole step, the same step of
a dense model, the choice of the set, whose time grows with the context, and the
layer's attention to a set, whose time must not. `peer` is transformers' V3.2
(eager and sdpa), which masks the scores of all pairs: a forward pass of one
layer, each in a process of its own, whose peak memory is the process's. The
bytes that a token reads are arithmetic, for V3.2's sizes (`bytes_read`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

from mla_moe import config as c
from mla_moe.config import ModelConfig

from .. import commands, page, runtime
from . import layer, models, show


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the model of one layer, and of its sets."""

  dim: int = 256
  heads: int = 4
  query_rank: int = 64
  kv_rank: int = 64
  nope_dim: int = 32
  rope_dim: int = 16
  value_dim: int = 32
  index_heads: int = 4
  index_dim: int = 32
  topk: int = 512


# Decoding reads long rows: its latents and index keys are as wide as V3.2's.
_WIDE = Sizes(
  dim=512,
  heads=16,
  query_rank=256,
  kv_rank=512,
  nope_dim=128,
  rope_dim=64,
  value_dim=128,
  index_heads=16,
  index_dim=128,
  topk=2048,
)


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  parser.add_argument('--only', default='', help='parts, joined by commas')
  parser.add_argument('--rounds', type=int, default=3, help='turns of each')
  parser.add_argument('--lengths', default='4096,8192,16384,32768')
  parser.add_argument(
    '--timed',
    type=int,
    default=0,
    help='the longest length whose step is run; of others, memory alone',
  )
  parser.add_argument('--contexts', default='32768,131072')
  parser.add_argument('--peer_length', type=int, default=8192)
  parser.add_argument(
    '--peer_python',
    default=sys.executable,
    help='a Python with torch and transformers',
  )


def run(out: pathlib.Path, args) -> None:
  """Measures the parts of `args.only`, prints them, writes OUT/sparse.html."""
  runtime.keep_memory()
  numbers = lambda text: [int(n) for n in text.split(',')]
  lengths, contexts = numbers(args.lengths), numbers(args.contexts)
  parts = {
    'training': lambda: training(Sizes(), lengths, args.rounds, args.timed),
    'decoding': lambda: decoding(_WIDE, contexts, args.rounds),
    'peer': lambda: peer(Sizes(), args.peer_length, args.peer_python),
  }
  results = show.measure(out / 'sparse.json', parts, args.only)
  notes = show.machines(results)
  draw_results = lambda: draw(results)
  show.results(
    out, 'sparse', 'Sparse attention', rows(results), notes, draw_results
  )


def model(sizes: Sizes, attention: str) -> ModelConfig:
  """Returns the model of one layer, with 'sparse' or 'dense' attention."""
  one = models.build(
    vocab=256,
    bos_id=0,
    eos_id=1,
    max_positions=1 << 20,
    layers=1,
    dense_layers=1,
    dense_width=sizes.dim,
    dim=sizes.dim,
    dtype='float32',
    compute=c.ComputeConfig(remat='none'),
    heads=sizes.heads,
    query_rank=sizes.query_rank,
    kv_rank=sizes.kv_rank,
    nope_dim=sizes.nope_dim,
    rope_dim=sizes.rope_dim,
    value_dim=sizes.value_dim,
  )
  if attention == 'dense':
    return one
  dsa = c.DSAConfig(
    heads=sizes.index_heads, dim=sizes.index_dim, topk=sizes.topk
  )
  return dataclasses.replace(one, dsa=dsa)


def _variables(config: ModelConfig):
  """Returns the model, and its parameters."""
  import jax
  import jax.numpy as jnp
  from flax import linen as nn

  from mla_moe.model import transformer

  net = transformer.Transformer(config)
  init = lambda key: nn.unbox(net.init(key, jnp.zeros((1, 8), jnp.int32)))
  return net, jax.jit(init)(jax.random.key(0))


# ------------------------------------------------------------------- measuring


def training(
  sizes: Sizes, lengths: list[int], rounds: int, timed: int = 0
) -> list[dict]:
  """Returns seconds and MiB of both kinds of a step, by length.

  The loss is a product with the hidden states, and the KL of the indexer.
  Seconds are the processor's; none of lengths beyond `timed`, if it is not 0.
  """
  import jax

  measured = []
  for length in lengths:
    calls, memory = {}, {}
    tokens = np.random.default_rng(0).integers(0, 256, (1, length))
    tokens = tokens.astype(np.int32)
    for attention in ('sparse', 'dense'):
      net, variables = _variables(model(sizes, attention))

      def loss(params, tokens, net=net):
        out = net.apply(params, tokens, method=net.features)
        extra = 0.0 if out.index is None else out.index.kl.sum()
        return (out.hidden**2 * 0.5).sum() + extra

      step = jax.jit(jax.grad(loss)).lower(variables, tokens).compile()
      size = step.memory_analysis().temp_size_in_bytes
      memory[attention] = size / 2**20
      run = functools.partial(step, variables, tokens)
      calls[attention] = lambda run=run: jax.block_until_ready(run())
    one = {'length': length}
    one |= {f'{kind}_mib': memory[kind] for kind in calls}
    if not timed or length <= timed:
      one |= layer.in_turns(calls, rounds, times=1, clock=time.process_time)
    measured.append(one)
  return measured


def decoding(sizes: Sizes, contexts: list[int], rounds: int) -> list[dict]:
  """Returns a token's seconds by context, the processor's.

  Of a step (sparse, dense), of the choice of the `set`, and of the attention of
  its layer to a set that is there, the `rest`.
  """
  import jax
  import jax.numpy as jnp

  from mla_moe.decode import forward, latent_cache, sparse_attention
  from mla_moe.model import indexer

  random = np.random.default_rng(0)
  draw = lambda *size: random.standard_normal(size, np.float32)
  values = lambda x: jnp.asarray(0.1 * draw(*x.shape))
  measured, longest = [], max(contexts) + 128
  states, steps = {}, {}
  for attention in ('sparse', 'dense'):
    config = model(sizes, attention)
    _, variables = _variables(config)
    weights = forward.layer_weights(config, variables)
    cache = latent_cache.empty(config, 1, longest)
    layers = jax.tree.map(values, cache.layers)
    step = functools.partial(forward.decode_step, config=config)
    steps[attention] = jax.jit(step, donate_argnums=1)
    states[attention] = [weights, cache.replace(layers=layers)]
  sparse = model(sizes, 'sparse')
  query = (1, 1, sizes.index_heads, sizes.index_dim)
  index = indexer.Index(draw(*query), draw(*query[:3]), draw(1, 1, query[-1]))
  select = jax.jit(
    lambda cache: sparse_attention.select(
      index, cache, cache.lengths[0] + 1, sparse.dsa.topk, 'gathered'
    )
  )

  def step_after(context, attention):
    weights, cache = states[attention]
    cache = cache.replace(lengths=jnp.full(1, context, jnp.int32))
    token = jnp.zeros(1, jnp.int32)
    logits, states[attention][1] = steps[attention](weights, cache, token)
    logits.block_until_ready()

  def select_after(context):
    _, cache = states['sparse']
    cache = cache.replace(lengths=jnp.full(1, context, jnp.int32))
    select(cache).block_until_ready()

  attend_after = _attention(sparse, states['sparse'])
  for context in contexts:
    calls = {
      kind: functools.partial(step_after, context, kind) for kind in steps
    }
    calls['set'] = functools.partial(select_after, context)
    calls['rest'] = functools.partial(attend_after, context)
    seconds = layer.in_turns(calls, rounds, 5, clock=time.process_time)
    measured.append({'context': context, **seconds})
  return measured


def _attention(config: ModelConfig, state: list):
  """Returns context -> None, a layer's attention to a set of keys all over it.

  `state` has the weights and the cache, which is replaced.
  """
  import jax
  import jax.numpy as jnp

  from mla_moe.decode import latent_attention
  from mla_moe.model import rope

  w = state[0]['layers'][0]['attention']
  w = {name: x for name, x in w.items() if name != 'indexer'}
  topk, rotary = config.dsa.topk, config.mla.rope_dim

  @functools.partial(jax.jit, donate_argnums=0)
  def attend(cache):
    (pages,), lengths = cache.layers, cache.lengths
    angles = rope.angles(lengths[:, None], rotary, config.mla.rope)
    keys = jnp.arange(topk) * (lengths[0] // topk)
    x = jnp.ones((1, 1, config.dim))
    args = w, x, angles, pages, cache, None, config, 'absorbed'
    out, pages, _ = latent_attention.attend(*args, keys[None, None])
    return out, cache.replace(layers=(pages,))

  def attend_after(context):
    lengths = jnp.full(1, context, jnp.int32)
    out, state[1] = attend(state[1].replace(lengths=lengths))
    out.block_until_ready()

  return attend_after


def bytes_read(context: int) -> dict:
  """Returns GB that a token of V3.2 reads of its caches, in bfloat16."""
  config = ModelConfig()
  latent = 2 * (config.mla.kv_rank + config.mla.rope_dim)
  key, topk = 2 * c.DSAConfig().dim, c.DSAConfig().topk
  sparse = context * key + min(topk, context) * latent
  scale = config.layers / 1e9
  return {'dense': context * latent * scale, 'sparse': sparse * scale}


def peer(sizes: Sizes, length: int, python: str) -> list[dict]:
  """Returns seconds and peak MiB of a forward pass: ours, and the peer's."""
  job = json.dumps({**dataclasses.asdict(sizes), 'length': length})
  file = str(pathlib.Path(__file__).parent / 'peer_sparse.py')
  racers = {'mla_moe': commands.program('bench.ours_sparse')}
  for mode in ('eager', 'sdpa'):
    racers[f'transformers, {mode}'] = [python, file, mode]
  measured = []
  for name, command in racers.items():
    ran = subprocess.run(
      command, input=job, capture_output=True, text=True, check=False
    )
    if ran.returncode:
      print(f'  left out: {name} (did not run; needs torch, transformers)')
      continue
    measured.append({'name': name, **json.loads(ran.stdout.splitlines()[-1])})
  return measured


# --------------------------------------------------------------------- showing


def rows(results: dict) -> list[tuple[str, str, str]]:
  """Returns (figure, its value, a figure to compare it with), in order."""
  figures = {name: part['figures'] for name, part in results.items()}
  rows = []
  training = figures.get('training', [])
  for one in training:
    first = training[0]
    linear = one['sparse_mib'] / first['sparse_mib']
    linear *= first['length'] / one['length']
    ours, other = f'{one["sparse_mib"]:,.0f} MiB', 'dense '
    if 'sparse' in one:
      ours = f'{one["sparse"]:.2f} s of processor, {ours}'
      other += f'{one["dense"] / one["sparse"]:.2f} x the time, '
    other += f'{one["dense_mib"]:,.0f} MiB; {linear:.2f} x of linear memory'
    rows.append((f'training step, {one["length"]:,} tokens', ours, other))
  decoding = figures.get('decoding', [])
  for one in decoding:
    rest, first = (x['rest'] for x in (one, decoding[0]))
    read, part = bytes_read(one['context']), one['set'] / one['sparse']
    rows.append(
      (
        f'a token after {one["context"]:,}',
        f'{1e3 * one["sparse"]:.1f} ms of processor, the set {part:.0%}',
        f'dense {one["dense"] / one["sparse"]:.2f} x; attention to a set '
        f'{1e3 * rest:.1f} ms, {rest / first:.2f} x the first; V3.2 reads '
        f'{read["sparse"]:.2f} GB, not {read["dense"]:.2f}',
      )
    )
  peers = figures.get('peer', [])
  for one in peers:
    own = peers[0]
    rows.append(
      (
        f'forward, {one["name"]}',
        f'{one["seconds"]:.2f} s, {one["mib"]:,.0f} MiB ({one["versions"]})',
        f'{one["seconds"] / own["seconds"]:.1f} x the time, '
        f'{one["mib"] / own["mib"]:.1f} x the memory of ours',
      )
    )
  return rows


def draw(results: dict):
  """Returns a figure of a training step by length, None without that part."""
  if 'training' not in results:
    return None
  training = results['training']['figures']
  timed = [one for one in training if 'sparse' in one]
  figure, axes = page.figure(2, height=3.2)
  for plot, end, unit in zip(
    axes.flat, ('', '_mib'), ('s', 'MiB'), strict=False
  ):
    for kind in ('sparse', 'dense'):
      points = [
        (one['length'], one[kind + end]) for one in (training if end else timed)
      ]
      x, y = ([p[i] for p in points] for i in (0, 1))
      plot.plot(x, y, 'o-', label=kind)
    plot.set(title='A training step', xlabel='tokens', ylabel=unit)
    plot.set_ylim(0, None)
    plot.legend(frameon=False)
  return figure
