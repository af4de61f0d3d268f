"""The setup of a run: source, mesh and compiled programs, all before step 1.

Whatever is wrong with a config or its text is reported here, before anything
is compiled. Nothing in a `Setup` changes during the run.
"""

from __future__ import annotations

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

from mla_moe import cost, fp8, sharding
from mla_moe.config import Config
from mla_moe.train.state import State

from .. import distributed, mesh_check, runtime
from ..adapters import base as frozen_base
from ..adapters import lora
from ..adapters.base import Base
from ..adapters.state import init_state
from ..data import tokenizer
from . import evaluation, fp8_health, program, source, warm_start


class Setup(NamedTuple):
  """A checked config with its source, its mesh and its jitted programs.

  byte_lengths: [V], the bytes of each token. rows: numbers of the rows of a
  micro-batch that this process reads. base: that of adapters.
  """

  config: Config
  path: pathlib.Path
  tokenizer: tokenizer.Tokenizer
  byte_lengths: np.ndarray
  source: source.Source
  mesh: jax.sharding.Mesh | None
  rows: np.ndarray
  train: Callable
  evaluate: Callable
  fp8_health: Callable
  base: Base = Base()

  def variables(self, params: Any, router: Any) -> dict[str, Any]:
    """Returns the model of a state's fields, with its frozen base if any."""
    joined = lora.join(self.base.params, params, self.config.model)
    return {'params': joined, 'router': router}

  def place(self, tree: Any) -> Any:
    """Puts a batch, or rates, on the device or on the mesh.

    A batch [n, B, T, ...] is split over the mesh's batch axes; other arrays are
    copied to all devices. The batch may be whole, or this process's rows.
    """
    if self.mesh is None:
      return jax.device_put(jax.tree.map(np.asarray, tree))

    data = self.config.data
    micro = data.micro_batch or data.batch_size

    def one(x):
      x = np.asarray(x)
      if x.ndim < 3:
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.make_array_from_callback(x.shape, everywhere, lambda i: x[i])
      split = program.batch_sharding(self.mesh)
      rows = np.arange(micro) if x.shape[1] == micro else self.rows
      shape = (len(x), micro, *x.shape[2:])
      take = functools.partial(_of_device, x, rows)
      return jax.make_array_from_callback(shape, split, take)

    return jax.tree.map(one, tree)


def prepare(
  config: Config,
  path: pathlib.Path,
  open_source: source.Open = source.open_text,
) -> Setup:
  """Returns the setup of a run in the folder `path`.

  Raises:
    ConfigError: a config, or a source, that cannot be used.
  """
  runtime.keep_memory()
  runtime.keep_compilations(path.parent / '.jax_cache')
  mesh_check.check(config)
  _, slow = fp8.choose(config.model.precision, config.model.compute.fp8)
  if slow:
    print(slow)
  model = config.model
  words = tokenizer.load(
    config.data.tokenizer, model.bos_id, model.eos_id, model.vocab
  )
  data = open_source(config, words, path)
  mesh = sharding.make_mesh(config.mesh) if config.mesh.devices > 1 else None
  programs = _jitted(program.of_devices(config))
  micro = config.data.micro_batch or config.data.batch_size
  rows = distributed.rows(mesh, micro, jax.local_devices())
  lengths = words.byte_lengths()
  base = frozen_base.load(config, mesh)
  if base.model:
    folder = config.run.base
    warm_start.check(config.model, base.model, folder, 'config.run.base')
  return Setup(config, path, words, lengths, data, mesh, rows, *programs, base)


@functools.lru_cache(maxsize=8)
def _jitted(config: Config) -> tuple[Callable, ...]:
  """Returns the jitted (train, evaluate, fp8_health).

  Runs of one process with the same config share them.
  """
  mesh, replicated = None, None
  if config.mesh.devices > 1:
    mesh = sharding.make_mesh(config.mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
  evaluate = functools.partial(_evaluate, config=config)
  examine = functools.partial(fp8_health.measure, config=config)
  return (
    program.jitted_step(config, mesh),
    jax.jit(evaluate, out_shardings=replicated),
    jax.jit(examine, out_shardings=replicated),
  )


def _evaluate(state: State, batch: Any, base: Any, *, config: Config) -> dict:
  """Returns `eval_step` of the model that the state is of."""
  params = lora.join(base, state.params, config.model)
  state = state.replace(params=params)
  return evaluation.eval_step(state, batch, config=config)


def fresh(setup: Setup) -> State:
  """Returns the state before the first step.

  It is committed to its device, as a restored state is: jit compiles a step
  for committed arrays and for others separately.
  """
  key = jax.random.key(setup.config.run.seed)
  config = program.of_state(setup.config)
  state = init_state(key, config, setup.mesh)
  if setup.base.router:
    # A step gives its state's buffers away: each has its own.
    own = lambda: jax.tree.map(jnp.copy, setup.base.router)
    reference = state.reference and state.reference | {'router': own()}
    state = state.replace(router=own(), reference=reference)
  return state if setup.mesh else jax.device_put(state, jax.devices()[0])


def _of_device(x: np.ndarray, rows: np.ndarray, index: tuple) -> np.ndarray:
  """Returns a device's part of a batch of which `x` has these rows."""
  start, stop, _ = index[1].indices(rows[-1] + 1)
  first, last = np.searchsorted(rows, [start, stop])
  return x[:, first:last]


def headline(config: Config) -> str:
  """Returns the sizes of the model and the run in a line."""
  data, counts = config.data, cost.parameters(config)
  return (
    f'{counts.total + counts.mtp:,} parameters, {counts.active:,} active; '
    f'{config.run.steps} steps of {data.batch_size} x {data.seq_len} tokens'
  )


def matmul_peak(config: Config) -> float:
  """Returns the FLOP/s of all devices in this model's widest dense product.

  That is tokens x dim x 2 widths; a run's MFU is relative to it. Runs of one
  process measure it once.
  """
  model, data = config.model, config.data
  rows = min((data.micro_batch or data.batch_size) * data.seq_len, 8192)
  return _peak(rows, model.dim, 2 * model.dense_width, model.dtype)


@functools.cache
def _peak(rows: int, dim: int, width: int, dtype: str) -> float:
  """Returns the FLOP/s of all devices in a product of these sizes."""
  a = jnp.ones((rows, dim), dtype)
  b = jnp.ones((dim, width), dtype)
  product = jax.jit(jnp.matmul)
  product(a, b).block_until_ready()
  best, began = math.inf, time.perf_counter()
  while time.perf_counter() - began < 0.3:
    start = time.perf_counter()
    product(a, b).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2.0 * rows * b.size / best * jax.device_count()
