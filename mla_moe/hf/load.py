"""Loads a released checkpoint: matrices stream from the files to the devices.

`config_json` translates config.json, `names` says which tensor is which part of
which leaf, `formats` decodes, `safetensors` maps the files into memory and
`source` checks the folder. Here matrices stream, in the order of the files, in
pieces, into every device's shard of a leaf (`leaves`).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from mla_moe.config import ModelConfig
from mla_moe.hf import config_json, leaves, names, source
from mla_moe.types import PyTree

_AHEAD = 128 * 2**20  # bytes that the disk reads ahead
_THREADS = 8  # each has a few matrices in memory


def load_huggingface(
  path: os.PathLike | str, dtype: Any = jnp.float32, mesh: Any = None
) -> tuple[ModelConfig, dict[str, PyTree]]:
  """Returns (config, {'params', 'router'}) of a released checkpoint.

  Args:
    path: a folder with config.json and .safetensors, in the layout of the
      releases or of transformers (`dialects`) and one of `formats`.
    dtype: of the parameters, float32 or bfloat16, and of the activations in the
      config. The router's bias for the choice of experts is always float32.
    mesh: a mesh of `sharding.make_mesh`, over which the leaves are sharded by
      their logical axes. Without it they lie on one device.

  Raises:
    ConfigError: a missing shard, tensors that are missing or left over, a wrong
      shape or dtype, an incomplete file, NaN, another architecture or format.

  Warns:
    ConfigWarning: tensors that are not read (`source.Source`).
  """
  dtype = config_json.parameter_dtype(dtype)
  with contextlib.ExitStack() as stack:
    opened = source.Source(pathlib.Path(path), dtype, stack)
    filling = leaves.empty(opened.config, opened.rows, dtype, mesh)

    def move(row: names.Row, index: dict[str, int], piece: slice) -> None:
      block = row.take(opened.matrix(row, index, piece))
      filling[row.path].put(block, row.start(index, piece))

    return opened.config, fill(opened, filling, move)


def fill(opened: source.Source, filling: dict, move: Callable) -> PyTree:
  """Returns the variables, whose leaves `move` fills piece by piece."""

  def whole(row, index):
    for piece in row.pieces:
      move(row, index, piece)
      opened.forget(row.tensor(index))

  is_local = lambda row, index: filling[row.path].is_local(row, index)
  local = [pair for pair in opened.matrices() if is_local(*pair)]
  in_threads(whole, local, opened)
  arrays = {path: leaf.finish() for path, leaf in filling.items()}
  tree = traverse_util.unflatten_dict(jax.block_until_ready(arrays))
  return {'router': {}} | tree


def in_threads(move: Callable, matrices: list, opened: source.Source) -> None:
  """Calls `move` for every matrix in threads, while the disk reads ahead.

  numpy and jax copy without Python's lock, so threads help. The first error
  ends the work and is raised.
  """
  count = min(len(os.sched_getaffinity(0)), _THREADS)
  waiting: list[futures.Future] = []
  unread = 0  # bytes left until the disk is asked again
  with futures.ThreadPoolExecutor(count) as pool:
    try:
      for row, index in matrices:
        name = row.tensor(index)
        if unread <= 0:
          opened.read_ahead(name, 2 * _AHEAD)
          unread = _AHEAD
        unread -= opened.size(name)
        waiting.append(pool.submit(move, row, index))
        if len(waiting) > 2 * count:
          waiting.pop(0).result()
      for future in waiting:
        future.result()
    finally:
      pool.shutdown(cancel_futures=True)
