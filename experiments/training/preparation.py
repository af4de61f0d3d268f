"""All that a run needs before its first step: made once, changed by nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments import distributed, runtime
from mla_moe import cost, fp8, sharding
from mla_moe.config import Config, RunConfig
from mla_moe.data import batches, corpus
from mla_moe.data import tokenizer as tokenizer_lib
from mla_moe.train import fp8_health, step
from mla_moe.train.state import State, init_state, placement


class Prepared(NamedTuple):
  """A checked config, its text, its mesh and its jitted steps."""

  config: Config
  path: pathlib.Path
  tokenizer: tokenizer_lib.Tokenizer
  lengths: np.ndarray  # bytes of each token
  text: corpus.Corpus
  heldout: list[batches.Batch]
  mesh: jax.sharding.Mesh | None
  share: tuple[int, int]  # of a batch's rows: this process's, of how many
  train: Callable
  evaluate: Callable
  examine: Callable  # FP8's health


def prepare(config: Config, path: pathlib.Path) -> Prepared:
  """Whatever is wrong with the config or its text is said here.

  Raises:
    ConfigError: before anything is compiled.
  """
  runtime.keep_memory()
  runtime.keep_compilations(path.parent / '.jax_cache')
  sharding.check(config)
  _, slow = fp8.choose(config.model.precision, config.model.compute.fp8)
  if slow:
    print(slow)
  tokenizer = tokenizer_lib.load(
    config.data.tokenizer, config.model.bos_id, config.model.eos_id
  )
  make = functools.partial(
    corpus.prepare, config.data, tokenizer, path.parent / '.corpus'
  )
  text = distributed.alone(make) or make()
  corpus.check(text, config)
  heldout = batches.eval_batches(
    text.heldout, config.data, text.bos_id, config.run.eval_batches
  )
  mesh = sharding.make_mesh(config.mesh) if config.mesh.devices > 1 else None
  # How long a run is and how often it speaks is nothing to a step.
  train, evaluate, examine = _jitted(
    dataclasses.replace(config, run=RunConfig())
  )
  return Prepared(
    config,
    path,
    tokenizer,
    tokenizer.byte_lengths(),
    text,
    heldout,
    mesh,
    distributed.share(mesh, config.data.micro_batch or config.data.batch_size),
    train,
    evaluate,
    examine,
  )


@functools.lru_cache(maxsize=4)
def _jitted(config: Config) -> tuple[Callable, ...]:
  """Runs of one process with the same numbers share their programs."""
  whole, placed = None, None
  if config.mesh.devices > 1:
    mesh = sharding.make_mesh(config.mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    placed = placement(config, mesh), whole
  train = functools.partial(step.train_step, config=config)
  evaluate = functools.partial(step.eval_step, config=config)
  examine = functools.partial(fp8_health.measure, config=config)
  return (
    jax.jit(
      train,
      donate_argnums=0,
      out_shardings=placed,
      compiler_options=runtime.step_options(),
    ),
    jax.jit(evaluate, out_shardings=whole),
    jax.jit(examine, out_shardings=whole),
  )


def fresh(ready: Prepared) -> State:
  """The state before any step, committed to its device as a restored one is.

  jit compiles for committed and for other arrays apart: a run would compile its
  step once more when it is resumed.
  """
  key = jax.random.key(ready.config.run.seed)
  state = init_state(key, ready.config, ready.mesh)
  return state if ready.mesh else jax.device_put(state, jax.devices()[0])


def place(ready: Prepared, tree: Any) -> Any:
  """A batch (or rates) on the device, or split over the mesh's batch axes."""
  if ready.mesh is None:
    return jax.device_put(jax.tree.map(np.asarray, tree))

  at, shares = ready.share
  data = ready.config.data
  micro = data.micro_batch or data.batch_size

  def one(x):
    x = np.asarray(x)
    if x.ndim != 3:
      here = NamedSharding(ready.mesh, PartitionSpec())
      return jax.make_array_from_callback(x.shape, here, lambda index: x[index])
    here = NamedSharding(ready.mesh, sharding.spec((None, 'batch', None)))
    # A batch that each process has read its own rows of, or one that all have.
    before = at * x.shape[1] if x.shape[1] * shares == micro else 0

    def rows(index):
      start, stop, _ = index[1].indices(micro)
      return x[:, start - before : stop - before]

    shape = (len(x), micro, x.shape[2])
    return jax.make_array_from_callback(shape, here, rows)

  return jax.tree.map(one, tree)


def headline(config: Config) -> str:
  """The model and the run in a line."""
  data, counts = config.data, cost.parameters(config)
  return (
    f'{counts.total + counts.mtp:,} parameters, {counts.active:,} active; '
    f'{config.run.steps} steps of {data.batch_size} x {data.seq_len} tokens'
  )


def matmul_peak(config: Config) -> float:
  """FLOP/s of this model's widest dense product, tokens x dim x 2 widths."""
  model, data = config.model, config.data
  rows = min((data.micro_batch or data.batch_size) * data.seq_len, 8192)
  a = jnp.ones((rows, model.dim), model.dtype)
  b = jnp.ones((model.dim, 2 * model.dense_width), model.dtype)
  product = jax.jit(jnp.matmul)
  product(a, b).block_until_ready()
  best, began = math.inf, time.perf_counter()
  while time.perf_counter() - began < 0.3:
    at = time.perf_counter()
    product(a, b).block_until_ready()
    best = min(best, time.perf_counter() - at)
  return 2.0 * rows * b.size / best * jax.device_count()
