"""Loads a release whose matrices stay in codes: `load_huggingface` of a base.

Embedding, head, norms and routers are floats. The matrices of attention and
MLPs are `Frozen`, from the file's own bytes where they fit (`codes`), and no
float of them is in memory but the piece that is being quantised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from mla_moe import load_huggingface, sharding
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.hf import config_json, leaves, load, names, source
from mla_moe.types import PyTree

from . import codes, lora
from .frozen import Frozen


def load_base(
  path: os.PathLike | str,
  base: str,
  dtype: Any = 'float32',
  mesh: Any = None,
) -> tuple[ModelConfig, dict[str, PyTree]]:
  """Returns (config, {'params', 'router'}) of a released checkpoint.

  Args:
    path: as `load_huggingface`.
    base: 'fp8', 'int8' or 'int4'; under 'trained' everything is floats.
    dtype: of the other leaves, and of the activations.
    mesh: as `load_huggingface`.

  Raises:
    ConfigError: as `load_huggingface`; a length that the codes do not divide.
  """
  if base == 'trained':
    return load_huggingface(path, dtype, mesh)
  dtype = config_json.parameter_dtype(dtype)
  with contextlib.ExitStack() as stack:
    opened = source.Source(pathlib.Path(path), dtype, stack)
    if opened.config.dsa.heads:
      raise ConfigError(
        f'base={base!r}: sparse attention (dsa.heads='
        f"{opened.config.dsa.heads}) has no frozen base; use 'trained'"
      )
    opened.config = dataclasses.replace(opened.config, base=base)
    filling = _empty(opened, dtype, mesh)

    def move(row: names.Row, index: dict[str, int], piece: slice) -> None:
      leaf = filling[row.path]
      if isinstance(leaf, codes.Leaf):
        leaf.put(row, index, piece, _codes(opened, row, index, piece, base))
      else:
        block = row.take(opened.matrix(row, index, piece))
        leaf.put(block, row.start(index, piece))

    return opened.config, load.fill(opened, filling, move)


def _empty(opened: source.Source, dtype: np.dtype, mesh: Any) -> dict:
  """Returns {path: empty leaf}, of floats or of codes."""
  boxed = {'params': lora.boxed_base(opened.config, str(dtype))}
  places = sharding.shardings(boxed, mesh) if mesh is not None else None
  filling, floats = {}, []
  for row in opened.rows:
    box, place = boxed, places
    for key in row.path if row.path[0] == 'params' else ():
      box, place = box[key], place and place[key]
    if not isinstance(box, Frozen):
      floats.append(row)
      continue
    place = place or dataclasses.replace(box, codes=None, scales=None)
    parts = [
      leaves.Leaf(b.value.shape, np.dtype(b.value.dtype), p)
      for b, p in ((box.codes, place.codes), (box.scales, place.scales))
    ]
    filling[row.path] = codes.Leaf(box, *parts)
  return filling | leaves.empty(opened.config, floats, dtype, mesh)


def _codes(opened, row, index, piece, base) -> tuple[np.ndarray, np.ndarray]:
  """Returns codes and scales of rows of a matrix."""
  part = row.within(index)
  part = part if piece == slice(None) else (piece, *part[1:])
  read = lambda name: opened.files[name].read(name)
  return codes.read(opened.stored[row.tensor(index)], part, read, base)
