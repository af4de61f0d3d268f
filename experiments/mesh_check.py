"""Refuses a mesh that cannot hold a model, before any compilation."""

from __future__ import annotations

import math

from mla_moe.config import Config, ConfigError


def check(config: Config):
  """Refuses, before any compilation, a mesh that cannot hold the model.

  `Config` itself has compared heads, experts, MoE layers and the batch with
  the mesh.

  Raises:
    ConfigError: a length that its mesh axes do not divide, an attention kernel
      that cannot work on a part of a sequence, or sparse attention in stages.
  """
  mesh, model, data = config.mesh, config.model, config.data
  divided = [
    ('tensor', mesh.tensor, 'model.vocab', model.vocab),
    ('tensor', mesh.tensor, 'model.dense_width', model.dense_width),
  ]
  axes, size = 'fsdp', mesh.fsdp
  if mesh.states == 'zero1':
    axes, size = 'data * fsdp', mesh.data * mesh.fsdp
  divided += [
    (axes, size, 'model.dim', model.dim),
    (axes, size, 'model.mla.kv_rank', model.mla.kv_rank),
    (axes, size, 'model.mla.query_rank', model.mla.query_rank),
  ]
  if model.moe_layers:
    width = model.moe.width
    divided.append(('tensor', mesh.tensor, 'model.moe.width', width))
  # Each part of a sequence is two pieces, one early and one late.
  pieces = 2 * mesh.context if mesh.context > 1 else 1
  both = math.lcm(mesh.context * mesh.tensor, pieces)
  divided.append(('context * tensor', both, 'data.seq_len', data.seq_len))
  for axes, size, name, length in divided:
    if length % size:
      twice = ' (two pieces each)' if size == pieces > 1 else ''
      raise ConfigError(
        f'config.mesh.{axes}={size}{twice}: must divide {name}={length}'
      )
  if model.dsa.heads and mesh.stage > 1:
    raise ConfigError(
      f'config.mesh.stage={mesh.stage}: stages pass no loss of an indexer on '
      f'(model.dsa.heads={model.dsa.heads}); use fsdp, context or tensor'
    )
  core = model.compute.attention
  if mesh.context > 1 and core not in ('auto', 'xla', 'reference'):
    raise ConfigError(
      f'model.compute.attention={core!r}: does not attend from a part of '
      f'a sequence (config.mesh.context={mesh.context}); use auto or xla'
    )
