"""Our side of the decoding benchmark, a program like `contender`'s.

It answers each line with the seconds of a prefill and of the greedy steps after
it, each step a program of its own, as a server runs them.
"""

from __future__ import annotations

import functools
import json
import sys
import time

import numpy as np

from experiments import runtime
from experiments.bench import shape as shapes


def weights(config, seed: int = 0):
  """Random parameters of a model, laid out for decoding."""
  import jax
  import jax.numpy as jnp
  from flax import linen as nn

  from mla_moe.decode import forward
  from mla_moe.model import transformer

  def make(key):
    tokens = jnp.zeros((1, 8), jnp.int32)
    variables = transformer.Transformer(config).init(key, tokens)
    return forward.unstack(config, nn.unbox(variables))

  return jax.jit(make)(jax.random.key(seed))


def step_function(config):
  """(weights, cache, tokens [B]) -> (greedy tokens [B], cache), jitted."""
  import jax
  import jax.numpy as jnp

  from mla_moe.decode import forward

  def step(weights, cache, tokens):
    logits, cache = forward.decode_step(weights, cache, tokens, config)
    return logits.argmax(-1).astype(jnp.int32), cache

  return jax.jit(step, donate_argnums=1)


def main() -> None:
  """The program: {'shape': ..., 'mode': 'float32'} first, then any lines."""
  import jax
  import jax.numpy as jnp

  from mla_moe.decode import forward, latent_cache

  job = json.loads(sys.stdin.readline())
  new = job['shape'].pop('new')
  shape = shapes.Shape(**job['shape'])
  config = shapes.config(shape, job['mode']).model
  runtime.keep_memory()
  params = weights(config)
  size = (shape.batch, shape.length)
  draw = np.random.default_rng(0)
  prompt = draw.integers(0, config.vocab, size).astype(np.int32)
  valid = np.full(shape.batch, shape.length, np.int32)

  @functools.partial(jax.jit, donate_argnums=1)
  def begin(params, cache, prompt, valid):
    cache = cache.replace(lengths=jnp.zeros_like(cache.lengths))
    x, cache = forward.prefill(params, cache, prompt, valid, config)
    logits = forward.logits(params, forward.last(x, valid))
    return logits.argmax(-1).astype(jnp.int32), cache

  step = step_function(config)
  cache = latent_cache.empty(config, shape.batch, shape.length + new)

  def once():
    nonlocal cache
    began = time.perf_counter()
    newest, cache = jax.block_until_ready(begin(params, cache, prompt, valid))
    between = time.perf_counter()
    for _ in range(new):
      newest, cache = step(params, cache, newest)
      newest.block_until_ready()
    return between - began, time.perf_counter() - between

  for _ in range(2):
    once()
  peak = runtime.peak_memory() / 2**20
  about = f'jax {jax.__version__}, {peak:.0f} MiB resident at most'
  print(json.dumps(about), flush=True)
  for _ in sys.stdin:
    print(json.dumps(once()), flush=True)


if __name__ == '__main__':
  main()
