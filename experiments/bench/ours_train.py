"""A training step of ours as a contender: one whole step is one measurement."""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from .. import runtime
from . import models


def batch(config, seed: int = 0):
  """Returns a batch of random tokens on the device, one micro-batch."""
  import jax

  from ..data import batches

  random = np.random.default_rng(seed)
  size = (1, config.data.batch_size, config.data.seq_len + 1)
  tokens = random.integers(0, config.model.vocab, size).astype(np.int32)
  positions = np.arange(config.data.seq_len, dtype=np.int32)
  inputs, targets = tokens[..., :-1], tokens[..., 1:]
  return jax.device_put(
    batches.Batch(
      tokens=inputs,
      targets=targets,
      segments=np.zeros_like(inputs),
      positions=np.broadcast_to(positions, inputs.shape),
      count=np.int32(1),
    )
  )


def main() -> None:
  """The contender; a job's mode is the dtype of the activations."""
  import jax

  from mla_moe.train import optim
  from mla_moe.train.state import init_state

  from ..training import program

  job = json.loads(sys.stdin.readline())
  config = models.config(models.Shape(**job['shape']), job['mode'])
  runtime.keep_memory()
  run, tokens = program.jitted_step(config, None), batch(config)
  rates = optim.Rates(1e-4, 1e-3, 0.0)
  state = init_state(jax.random.key(0), config)

  for _ in range(2):
    state, values = jax.block_until_ready(run(state, tokens, rates))
  print(json.dumps(f'jax {jax.__version__}'), flush=True)
  for _ in sys.stdin:
    began = time.perf_counter()
    state, values = run(state, tokens, rates)
    float(values['loss'])
    jax.block_until_ready(state)
    print(json.dumps(time.perf_counter() - began), flush=True)


if __name__ == '__main__':
  main()
