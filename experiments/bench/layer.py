"""One attention layer that decodes: latents cached, and every head cached.

The layer has V2-Lite's width, and each row has 2048 tokens behind it. With a
cache of latents it is the absorbed form; with a cache of keys and values it
makes those of the new token once, and reads all the others'.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe.config import MLAConfig
from mla_moe.decode import latent_attention, latent_cache
from mla_moe.model import layers, products, rope

from . import models

_MLA, _DIM, _CONTEXT = MLAConfig(heads=16, query_rank=0), 2048, 2048


def copy_bandwidth(mebibytes: int = 256) -> float:
  """Returns bytes a second, read and written, of a copy on all cores.

  It is the best of ten. The copy is written over its source: fresh memory would
  be faulted in page by page, and that takes longer than the copy.
  """
  copy = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = copy(jnp.ones((mebibytes, 2**18), jnp.float32)).block_until_ready()
  seconds = []
  for _ in range(10):
    began = time.perf_counter()
    x = copy(x).block_until_ready()
    seconds.append(time.perf_counter() - began)
  return 2 * x.nbytes / min(seconds)


def in_turns(
  calls: dict, rounds: int, times: int, clock: Callable = time.perf_counter
) -> dict:
  """Returns median seconds of each call, made `times` in a row, in turns.

  With the `clock` time.process_time they are those of the processor, which
  other programs of the machine hardly change.
  """
  seconds = {name: [] for name in calls}
  for call in calls.values():
    call()
  for _ in range(rounds):
    for name, call in calls.items():
      began = clock()
      for _ in range(times):
        call()
      seconds[name].append((clock() - began) / times)
  return {name: float(np.median(x)) for name, x in seconds.items()}


def measure(batches: tuple[int, ...], rounds: int) -> dict:
  """Returns, by batch, seconds with both caches, and a fraction.

  It is that of the copy bandwidth at which an absorbed layer reads the bytes
  that it must, its weights and the latents.
  """
  keys = iter(jax.random.split(jax.random.key(0), 9))
  random = lambda *size: 0.02 * jax.random.normal(next(keys), size)
  w = _weights(random)
  read = sum(leaf.nbytes for leaf in jax.tree.leaves(w))
  figures = {}
  for batch in batches:
    x = random(batch, 1, _DIM)
    seconds, cached = _both(w, x, rounds)
    rate = (cached + read) / seconds['latent'] / copy_bandwidth()
    figures[batch] = {**seconds, 'fraction': rate}
  return figures


def _weights(random):
  """Returns the layer's weights, laid out for decoding."""
  return latent_attention.weights(
    {
      'w_q': random(_DIM, 16, 192),
      'w_kv_down': random(_DIM, 512),
      'w_k_rope': random(_DIM, 64),
      'w_k_up': random(512, 16, 128),
      'w_v_up': random(512, 16, 128),
      'w_out': random(16, 128, _DIM),
      'kv_norm': {'scale': jnp.ones(512)},
    },
    'float32',
  )


def _both(w, x, rounds: int) -> tuple[dict, int]:
  """Returns the seconds of both layers, and the bytes of the latents."""
  batch = len(x)
  config = dataclasses.replace(
    models.config(models.Shape()).model, mla=_MLA, dim=_DIM, layers=1
  )
  lengths = jnp.full(batch, _CONTEXT - 1, jnp.int32)
  turn = rope.angles(lengths[:, None], 64, _MLA.rope)
  cache = latent_cache.empty(config, batch, _CONTEXT).replace(lengths=lengths)
  cached = cache.layers[0].values.nbytes
  state = {
    'latent': cache.layers[0],
    'heads': (
      jnp.zeros((batch * 16, _CONTEXT, 192)),
      jnp.zeros((batch * 16, _CONTEXT, 128)),
    ),
  }
  absorbed = functools.partial(
    latent_attention.attend,
    valid=None,
    config=config,
    form='absorbed',
    cache=cache,
  )
  layer = {
    'latent': jax.jit(absorbed, donate_argnums=3),
    'heads': jax.jit(_per_head, donate_argnums=3),
  }
  weights = {
    'latent': w,
    'heads': w | {'w_v_up': w['w_v_up'].swapaxes(1, 2)},
  }

  def step(name):
    y, state[name], *_ = layer[name](weights[name], x, turn, state[name])
    y.block_until_ready()

  calls = {name: functools.partial(step, name) for name in layer}
  return in_turns(calls, rounds, times=10), cached


def _per_head(w, x, turn, cache):
  """Returns the same layer's output with keys and values, [B N, S, width]."""
  b = x.shape[0]
  down = products.matmul_transposed(x, w['w_down'])
  latent, k_rope = jnp.split(down, [_MLA.kv_rank], axis=-1)
  latent = layers.normalize(latent, w['kv_norm'], _MLA.norm_eps)
  q = products.matmul_transposed(x, w['w_q']).reshape(b, 1, _MLA.heads, -1)
  q_nope, q_rope = jnp.split(q, [_MLA.nope_dim], axis=-1)
  q = jnp.concatenate([q_nope, rope.rotate(q_rope, turn)], -1)[:, 0]
  k_nope = products.matmul_transposed(latent[:, 0], w['w_k_up'])
  shared = rope.rotate(k_rope, turn)
  shared = jnp.broadcast_to(shared, (*k_nope.shape[:2], _MLA.rope_dim))
  k = jnp.concatenate([k_nope, shared], axis=-1)
  v = products.matmul_transposed(latent[:, 0], w['w_v_up'])
  put = lambda cache, x: jax.lax.dynamic_update_slice(
    cache, x.reshape(-1, 1, x.shape[-1]), (0, _CONTEXT - 1, 0)
  )
  # Rows and heads are one axis: of one row XLA would make copies.
  keys, values = put(cache[0], k), put(cache[1], v)
  q = q.reshape(-1, q.shape[-1])
  logits = jnp.einsum('nh,nsh->ns', q, keys) * rope.softmax_scale(_MLA)
  out = jnp.einsum('ns,nsu->nu', jax.nn.softmax(logits), values)
  y = products.matmul_transposed(out.reshape(b, 1, -1), w['w_out'])
  return y, (keys, values)
