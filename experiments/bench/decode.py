"""The decoding benchmark: speed beside a peer, the cache, long contexts.

Speed is compared at the training benchmark's shape after 512 tokens of context,
by turns with transformers' DeepSeek-V3 (static cache, compiled; and plain). The
floor of a step is what it must read, the weights of the experts that its rows
chose and the rows' latents, at the bandwidth of a copy on the same machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time

import numpy as np

from experiments import page, runtime
from experiments.bench import contender, decoder, train
from experiments.bench import shape as shapes
from mla_moe import cost
from mla_moe.config import ConfigError, MLAConfig, ModelConfig

# tokens/s at batch 1 and 8 that others reached once on two cores, medians; what
# they compute is in the README.
OTHERS = {
  'EasyDeL 0.3.0, every expert': (287, 488),
  'MaxText 0.2.5, every expert': (112, 244),
  'jax-llm-examples': (46, 312),
}

_NEW = 64
_BATCHES = (1, 8)
_CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclasses.dataclass(frozen=True)
class _Job(shapes.Shape):
  """A shape with the tokens that are decoded after `length` of context."""

  new: int = _NEW


def run(out: pathlib.Path, args) -> None:
  """Measures what `args.only` names (all: everything), prints, writes a page.

  OUT/decode.json keeps what was measured before.
  """
  measures = {
    'speed': lambda: _speed(args.peer_python, args.rounds),
    'cache': _cache_table,
    'layer': lambda: _layer(args.rounds),
    'context': lambda: _by_context(args.rounds),
  }
  chosen = args.only.split(',') if args.only else list(measures)
  for name in chosen:
    if name not in measures:
      raise ConfigError(f'--only={name}: there is only {", ".join(measures)}')
  runtime.keep_memory()
  kept = out / 'decode.json'
  found = json.loads(kept.read_text()) if kept.exists() else {}
  for name in chosen:
    began = time.perf_counter()
    print(f'measuring {name} ...', end=' ', flush=True)
    measured = json.loads(json.dumps(measures[name]()))
    found[name] = {'machine': train.machine(), 'found': measured}
    print(f'{time.perf_counter() - began:.0f} s')
    kept.write_text(json.dumps(found, indent=1))
  _print(found)
  with contextlib.suppress(ImportError):
    (out / 'decode.html').write_text(_page(found))
    print(f'Results: {out / "decode.html"} and decode.json.')


# ------------------------------------------------------------------- measuring


def copy_bandwidth(mebibytes: int = 256) -> float:
  """Bytes read and written a second by a copy on all cores: the best of ten.

  Written over what was read: fresh memory would be faulted in page by page, and
  that takes longer than the copy.
  """
  import jax
  import jax.numpy as jnp

  copy = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = copy(jnp.ones((mebibytes, 2**18), jnp.float32)).block_until_ready()
  seconds = []
  for _ in range(10):
    began = time.perf_counter()
    x = copy(x).block_until_ready()
    seconds.append(time.perf_counter() - began)
  return 2 * x.nbytes / min(seconds)


def step_bytes(shape: shapes.Shape, context: int) -> float:
  """What a step must read, float32: weights in use, and the rows' latents.

  Of the routed experts, those that `batch` rows choose when all are alike.
  """
  config = shapes.config(shape).model
  counts = cost.parameters(config)
  expert = 3 * shape.dim * shape.width
  missed = (1 - shape.top_k / shape.experts) ** shape.batch
  chosen = shape.experts * (1 - missed) * config.moe_layers * expert
  rest = counts.total - counts.routed - counts.embedding
  rows = shape.batch * context * cost.cache_bytes_per_token(config, 'float32')
  return 4 * (rest + chosen) + rows


def _speed(peer_python: str, rounds: int) -> dict:
  folder = pathlib.Path(__file__).parent
  peer = [peer_python, str(folder / 'peer_decode.py')]
  ours = [sys.executable, '-m', 'experiments.bench.decoder']
  racers = {}
  for batch in _BATCHES:
    job = _Job(batch=batch)
    start = lambda command, mode, job=job: contender.Contender(
      command, job, mode
    )
    racers['mla_moe', batch] = start(ours, 'float32')
    for mode in ('static compile', 'plain'):
      racers[f'transformers, {mode}', batch] = start(peer, mode)
  for name in [name for name, racer in racers.items() if not racer.versions]:
    print(f'  left out: {name} (did not start; needs torch, transformers)')
    racers.pop(name)
  contender.take_turns(racers, rounds)
  bandwidth = copy_bandwidth()
  found = []
  for (name, batch), racer in racers.items():
    prefill, steps = np.array(racer.seconds).T
    rate = batch * _NEW / steps
    read = step_bytes(_Job(batch=batch), _Job.length + _NEW // 2)
    found.append(
      {
        'name': name,
        'batch': batch,
        'tokens_per_s': float(np.median(rate)),
        'fastest': float(rate.max()),
        'prefill': float(batch * _Job.length / np.median(prefill)),
        'share': float(read * _NEW / np.median(steps) / bandwidth),
        'versions': racer.versions,
      }
    )
  return {'rates': found, 'bandwidth': bandwidth}


def _cache_table() -> list:
  """Bytes a token and layer in bfloat16, if the model's heads were cached."""
  small = shapes.config(shapes.Shape()).model
  found = []
  for name, model in {
    'DeepSeek-V3': ModelConfig(),
    'this shape': small,
  }.items():
    mla = model.mla
    head = mla.nope_dim + mla.rope_dim + mla.value_dim
    found.append(
      {
        'model': name,
        'every head': 2 * mla.heads * head,
        '8 heads (GQA)': 2 * 8 * 2 * mla.nope_dim,
        'latent (MLA)': cost.cache_bytes_per_token(model) // model.layers,
      }
    )
  return found


def _turns(runs: dict, rounds: int, times: int) -> dict:
  """Median seconds of each of `runs`, called `times` in a row, by turns."""
  taken = {name: [] for name in runs}
  for one in runs.values():
    one()
  for _ in range(rounds):
    for name, one in runs.items():
      began = time.perf_counter()
      for _ in range(times):
        one()
      taken[name].append((time.perf_counter() - began) / times)
  return {name: float(np.median(x)) for name, x in taken.items()}


def _layer(rounds: int) -> dict:
  """One attention layer at V2-Lite's width, 2048 tokens back, both caches."""
  import jax
  import jax.numpy as jnp

  from mla_moe.decode import latent_attention, latent_cache
  from mla_moe.model import rope

  mla, dim, context = MLAConfig(heads=16, query_rank=0), 2048, 2048
  config = dataclasses.replace(
    shapes.config(shapes.Shape()).model, mla=mla, dim=dim, layers=1
  )
  keys = iter(jax.random.split(jax.random.key(0), 9))
  make = lambda *size: 0.02 * jax.random.normal(next(keys), size)
  w = latent_attention.weights(
    {
      'w_q': make(dim, 16, 192),
      'w_kv_down': make(dim, 512),
      'w_k_rope': make(dim, 64),
      'w_k_up': make(512, 16, 128),
      'w_v_up': make(512, 16, 128),
      'w_out': make(16, 128, dim),
      'kv_norm': {'scale': jnp.ones(512)},
    },
    'float32',
  )
  of_heads = w | {'w_v_up': w['w_v_up'].swapaxes(1, 2)}
  found = {}
  for batch in _BATCHES:
    x = make(batch, 1, dim)
    lengths = jnp.full(batch, context - 1, jnp.int32)
    turn = rope.angles(lengths[:, None], 64, mla.rope)
    held = latent_cache.empty(config, batch, context)
    held = held.replace(lengths=lengths)
    state = {
      'latent': held.layers[0],
      'heads': (
        jnp.zeros((batch * 16, context, 192)),
        jnp.zeros((batch * 16, context, 128)),
      ),
    }
    latent = jax.jit(
      functools.partial(
        latent_attention.attend,
        valid=None,
        mla=mla,
        form='absorbed',
        cache=held,
      ),
      donate_argnums=3,
    )
    heads = jax.jit(
      functools.partial(_per_head, mla=mla, at=context - 1), donate_argnums=3
    )

    def step(name, run, w, x=x, turn=turn, state=state):
      y, state[name] = run(w, x, turn, state[name])
      y.block_until_ready()

    seconds = _turns(
      {
        'latent': functools.partial(step, 'latent', latent, w),
        'heads': functools.partial(step, 'heads', heads, of_heads),
      },
      rounds,
      10,
    )
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(w))
    cached = held.layers[0].values.nbytes
    rate = (cached + weights) / seconds['latent'] / copy_bandwidth()
    found[batch] = {**seconds, 'share': rate}
  return found


def _per_head(w, x, turn, cache, *, mla, at):
  """The same layer over keys and values of every head, [B N, S, width]."""
  import jax
  import jax.numpy as jnp

  from mla_moe.model import layers, products, rope

  b = x.shape[0]
  down = products.matmul_transposed(x, w['w_down'])
  latent, k_rope = jnp.split(down, [mla.kv_rank], axis=-1)
  latent = layers.normalize(latent, w['kv_norm'], mla.norm_eps)
  q = products.matmul_transposed(x, w['w_q']).reshape(b, 1, mla.heads, -1)
  q_nope, q_rope = jnp.split(q, [mla.nope_dim], axis=-1)
  q = jnp.concatenate([q_nope, rope.rotate(q_rope, *turn)], -1)[:, 0]
  k_nope = products.matmul_transposed(latent[:, 0], w['w_k_up'])
  shared = rope.rotate(k_rope, *turn)
  shared = jnp.broadcast_to(shared, (*k_nope.shape[:2], mla.rope_dim))
  k = jnp.concatenate([k_nope, shared], axis=-1)
  v = products.matmul_transposed(latent[:, 0], w['w_v_up'])
  put = lambda cache, new: jax.lax.dynamic_update_slice(
    cache, new.reshape(-1, 1, new.shape[-1]), (0, at, 0)
  )
  # Rows and heads are one axis: of one row XLA would make copies.
  keys, values = put(cache[0], k), put(cache[1], v)
  q = q.reshape(-1, q.shape[-1])
  logits = jnp.einsum('nh,nsh->ns', q, keys) * rope.softmax_scale(mla)
  out = jnp.einsum('ns,nsu->nu', jax.nn.softmax(logits), values)
  return products.matmul_transposed(out.reshape(b, 1, -1), w['w_out']), (
    keys,
    values,
  )


def _by_context(rounds: int) -> dict:
  """Milliseconds of a step, batch 1, by the tokens before it."""
  import jax.numpy as jnp

  from mla_moe.decode import latent_cache

  shape = shapes.Shape()
  config = shapes.config(shape).model
  params, step = decoder.weights(config), decoder.step_function(config)
  held = latent_cache.empty(config, 1, max(_CONTEXTS) + 128)
  state = {'cache': held, 'newest': jnp.zeros(1, jnp.int32)}

  def at(context):
    cache = state['cache'].replace(lengths=jnp.full(1, context, jnp.int32))
    state['newest'], state['cache'] = step(params, cache, state['newest'])
    state['newest'].block_until_ready()

  runs = {c: functools.partial(at, c) for c in _CONTEXTS}
  seconds = _turns(runs, rounds, 20)
  bandwidth = copy_bandwidth()
  per_token = cost.cache_bytes_per_token(config, 'float32')
  first = min(_CONTEXTS)
  return {
    context: {
      'ms': 1e3 * taken,
      'floor_ms': 1e3
      * (seconds[first] + (context - first) * per_token / bandwidth),
    }
    for context, taken in seconds.items()
  }


# --------------------------------------------------------------------- showing


def _rows(found: dict) -> list[tuple[str, str, str]]:
  rows = []
  if 'speed' in found:
    rates = found['speed']['found']['rates']
    for one in rates:
      beside = f'best {one["fastest"]:.0f}, prefill {one["prefill"]:,.0f}'
      if one['name'] == 'mla_moe':
        beside += f', {one["share"]:.0%} of copy bandwidth'
        beside += f' ({one["versions"]})'
      shown = f'{one["tokens_per_s"]:.0f} tokens/s'
      rows.append((f'{one["name"]}, batch {one["batch"]}', shown, beside))
    for name, values in OTHERS.items():
      shown = ' and '.join(map(str, values))
      rows.append((f'{name}, once', shown, 'batch 1 and 8'))
  for one in found.get('cache', {}).get('found', []):
    bytes_ = ', '.join(f'{k}: {v:,}' for k, v in one.items() if k != 'model')
    rows.append((f'cache of {one["model"]}', bytes_, 'B a token and layer'))
  for batch, one in found.get('layer', {}).get('found', {}).items():
    rows.append(
      (
        f'absorbed layer, batch {batch}',
        f'{1e3 * one["latent"]:.2f} ms, {one["share"]:.0%} of copy bandwidth',
        f'per-head cache {one["heads"] / one["latent"]:.1f}x',
      )
    )
  for context, one in found.get('context', {}).get('found', {}).items():
    shown = f'{one["ms"]:.2f} ms'
    beside = f'512 plus reading the latents: {one["floor_ms"]:.2f}'
    rows.append((f'a token after {context}', shown, beside))
  return rows


def _print(found: dict) -> None:
  from rich import console, table

  shown = table.Table('what', 'measured', 'beside', title='Decoding')
  for row in _rows(found):
    shown.add_row(*row)
  console.Console(width=120).print(shown)
  for machine in train.machines(found):
    print(machine)


def _page(found: dict) -> str:
  import matplotlib

  matplotlib.use('Agg')
  parts = []
  if 'context' in found:
    by = found['context']['found']
    contexts = [int(c) for c in by]
    drawn, axes = page.figure(1, height=3.2)
    plot = axes.flat[0]
    plot.plot(contexts, [x['ms'] for x in by.values()], 'o-', label='measured')
    floor = [x['floor_ms'] for x in by.values()]
    plot.plot(contexts, floor, ':', label='512, and reading the latents')
    plot.set(title='A token', xlabel='tokens before it', ylabel='ms')
    plot.set_ylim(0, None)
    plot.legend(frameon=False)
    parts.append(page.svg(drawn))
  body = ''.join(
    f'<tr><td>{a}</td><td>{b}</td><td>{c}</td></tr>' for a, b, c in _rows(found)
  )
  parts.append(f'<table>{body}</table>')
  parts += [f'<p>{machine}</p>' for machine in train.machines(found)]
  return page.page('Decoding benchmark', parts)
