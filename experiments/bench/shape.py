"""The shape that frameworks are compared at, and variations of it."""

from __future__ import annotations

import dataclasses

from mla_moe.config import (
  ComputeConfig,
  Config,
  DataConfig,
  MLAConfig,
  ModelConfig,
  MoEConfig,
  MTPConfig,
)


@dataclasses.dataclass(frozen=True)
class Shape:
  """A V3 in miniature without MTP, which the peers do not train."""

  vocab: int = 4096
  dim: int = 256
  layers: int = 4
  dense_layers: int = 1
  dense_width: int = 768
  heads: int = 8
  query_rank: int = 192
  kv_rank: int = 128
  nope_dim: int = 32
  rope_dim: int = 16
  value_dim: int = 32
  experts: int = 32
  top_k: int = 4
  groups: int = 4
  top_groups: int = 2
  shared: int = 1
  width: int = 128
  batch: int = 8
  length: int = 512


def config(shape: Shape, dtype: str = 'float32') -> Config:
  """Our config of a shape; what it leaves out are V3's defaults."""
  names = lambda cls: {
    f.name: getattr(shape, f.name)
    for f in dataclasses.fields(cls)
    if hasattr(shape, f.name)
  }
  model = ModelConfig(
    **names(ModelConfig),
    max_positions=max(shape.length, 4096),
    init_std=0.02,
    dtype=dtype,
    compute=ComputeConfig(remat='products'),
    mla=MLAConfig(**names(MLAConfig)),
    moe=MoEConfig(**names(MoEConfig)),
    mtp=MTPConfig(depth=0),
  )
  data = DataConfig(seq_len=shape.length, batch_size=shape.batch)
  return Config(model=model, data=data)
