"""Our decoding as a contender: a prefill, then greedy steps.

One measurement is the seconds of the prefill and of all steps after it. Each
step is a program of its own, as a server runs them; nothing samples.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from .. import runtime
from . import models


def weights(config, seed: int = 0):
  """Returns random parameters of a model, laid out for decoding."""
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
  """Returns (weights, cache, tokens [B]) -> (greedy tokens [B], cache)."""
  import jax
  import jax.numpy as jnp

  from mla_moe.decode import forward

  def step(weights, cache, tokens):
    logits, cache = forward.decode_step(weights, cache, tokens, config)
    return logits.argmax(-1).astype(jnp.int32), cache

  return jax.jit(step, donate_argnums=1)


def prefill_function(config):
  """Returns (weights, cache, prompts [B, T], lengths [B]) -> as a step does.

  The cache may have been used: it is read from its start again.
  """
  import jax
  import jax.numpy as jnp

  from mla_moe.decode import forward

  def prefill(weights, cache, prompts, lengths):
    cache = cache.replace(lengths=jnp.zeros_like(cache.lengths))
    x, cache = forward.prefill(weights, cache, prompts, lengths, config)
    logits = forward.logits(weights, forward.last(x, lengths))
    return logits.argmax(-1).astype(jnp.int32), cache

  return jax.jit(prefill, donate_argnums=1)


def main() -> None:
  """The contender; a job's shape has `steps`, those after the prompt."""
  import jax

  from mla_moe.decode import latent_cache

  job = json.loads(sys.stdin.readline())
  steps = job['shape'].pop('steps')
  shape = models.Shape(**job['shape'])
  config = models.config(shape, job['mode']).model
  runtime.keep_memory()
  params = weights(config)
  size = (shape.batch, shape.length)
  random = np.random.default_rng(0)
  prompts = random.integers(0, config.vocab, size).astype(np.int32)
  lengths = np.full(shape.batch, shape.length, np.int32)
  prefill, step = prefill_function(config), step_function(config)
  cache = latent_cache.empty(config, shape.batch, shape.length + steps)

  def once():
    nonlocal cache
    began = time.perf_counter()
    tokens, cache = jax.block_until_ready(
      prefill(params, cache, prompts, lengths)
    )
    between = time.perf_counter()
    for _ in range(steps):
      tokens, cache = step(params, cache, tokens)
      tokens.block_until_ready()
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
