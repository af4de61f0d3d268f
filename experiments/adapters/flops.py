"""The FLOPs of training adapters: those of a run, less the frozen weights'.

A matrix that is trained costs 6 FLOPs a number and token: 2 forward, 2 for the
gradient of its input, 2 for its own. A frozen one has no gradient of its own
and costs 4 (`cost`); an adapter beside it is trained and costs 6. Attention
between tokens has no weights and costs the same.
"""

from __future__ import annotations

import functools

import jax
from flax import linen as nn

from mla_moe import cost
from mla_moe.config import Config, ModelConfig

from . import lora


def train_flops_per_token(
  config: Config, seq_len: float, mtp: bool = False
) -> float:
  """Returns `cost.train_flops_per_token`, of a run with adapters, too."""
  whole = cost.train_flops_per_token(config, seq_len, mtp)
  if not config.model.lora.rank:
    return whole
  matrices = cost.train_flops_per_token(config, 0, mtp)
  return whole - matrices / 3 + 6.0 * active(config.model)


def share(config: Config, seq_len: float) -> float:
  """Returns a run's FLOPs over those that train every parameter."""
  whole = cost.train_flops_per_token(config, seq_len)
  return train_flops_per_token(config, seq_len) / whole


@functools.lru_cache(16)
def active(model: ModelConfig) -> float:
  """Returns the adapters' parameters that multiply one token."""
  shapes, total = nn.unbox(lora.boxed_shapes(model)), 0.0
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    stack, *_, module, _, _ = (key.key for key in path)
    is_expert = stack == 'moe' and module == 'ffn'
    # [layers, experts, ...], where all experts may share one.
    times = model.moe.top_k / leaf.shape[1] if is_expert else 1
    total += times * leaf.size
  return total
