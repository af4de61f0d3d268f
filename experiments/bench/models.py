"""The models that benchmarks train and time, each as a few sizes.

A ModelConfig has its sizes in three groups (itself, `mla` and `moe`); `build`
takes them as one flat list. None of these models predicts more than one token
(MTP): the peers do not train such a module.
"""

from __future__ import annotations

import dataclasses

from mla_moe import config as c


def build(**sizes) -> c.ModelConfig:
  """Returns the model of these fields of ModelConfig, MLAConfig and MoEConfig.

  Raises:
    TypeError: none of the three has a field of some name.
  """
  groups = [c.ModelConfig, c.MLAConfig, c.MoEConfig]
  names = [{field.name for field in dataclasses.fields(g)} for g in groups]
  unknown = set(sizes).difference(*names)
  if unknown:
    raise TypeError(f'{sorted(unknown)}: no field of a model')
  model, mla, moe = [
    {name: sizes[name] for name in sizes if name in group} for group in names
  ]
  return c.ModelConfig(
    **model,
    mla=c.MLAConfig(**mla),
    moe=c.MoEConfig(**moe),
    mtp=c.MTPConfig(depth=0),
  )


# Of models that read bytes: the byte tokenizer's ids, and routing without
# groups. One dense layer, float32, nothing computed again going backward.
BYTES = dict(
  vocab=264,
  bos_id=256,
  eos_id=257,
  max_positions=256,
  dense_layers=1,
  query_rank=0,
  groups=1,
  top_groups=1,
  scale=1.0,
  dtype='float32',
  compute=c.ComputeConfig(remat='none'),
)

# Of notebook 2: two layers of 16 experts, 4 for each token.
ROUTING = build(
  **BYTES,
  dim=64,
  layers=3,
  dense_width=128,
  init_std=0.05,
  heads=2,
  kv_rank=32,
  nope_dim=16,
  rope_dim=8,
  value_dim=16,
  experts=16,
  top_k=4,
  width=32,
)

# Of `mesh`: 32 experts, whose number eight devices divide.
MESH = build(
  vocab=512,
  dim=256,
  layers=3,
  dense_layers=1,
  dense_width=512,
  max_positions=512,
  init_std=0.02,
  dtype='float32',
  compute=c.ComputeConfig(remat='latents'),
  heads=8,
  query_rank=96,
  kv_rank=64,
  nope_dim=32,
  rope_dim=16,
  value_dim=32,
  experts=32,
  top_k=4,
  width=128,
  groups=1,
  top_groups=1,
)


@dataclasses.dataclass(frozen=True)
class Shape:
  """The model and batch of `train` and `decode`, at which peers are compared.

  A V3 in miniature. It travels to the peers' programs as JSON, and they have
  configs of their own: so it is flat, and knows no class of this package.
  """

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


def config(shape: Shape, dtype: str = 'float32') -> c.Config:
  """Returns our config of a shape; the rest is V3's defaults."""
  sizes = {field.name: getattr(shape, field.name) for field in _SHAPE}
  batch, length = sizes.pop('batch'), sizes.pop('length')
  model = build(
    **sizes,
    max_positions=max(length, 4096),
    init_std=0.02,
    dtype=dtype,
    compute=c.ComputeConfig(remat='products'),
  )
  data = c.DataConfig(seq_len=length, batch_size=batch)
  return c.Config(model=model, data=data)


_SHAPE = dataclasses.fields(Shape)  # not those of a job that extends it
