"""DeepSeek-V3-style models in JAX and Flax: MLA, fine-grained MoE, MTP.

    from mla_moe import Config, Transformer, cost, generate, load_huggingface

Importing this package does nothing else: no flags, no logging, no devices.
"""

from __future__ import annotations

from mla_moe import cost
from mla_moe.config import CacheConfig, Config, ConfigError, ModelConfig
from mla_moe.decode.generation import generate, rollout
from mla_moe.hf.load import load_huggingface
from mla_moe.hf.save import save_huggingface
from mla_moe.model.transformer import Output, Transformer

__all__ = [
  'CacheConfig',
  'Config',
  'ConfigError',
  'ModelConfig',
  'Output',
  'Transformer',
  'cost',
  'generate',
  'load_huggingface',
  'rollout',
  'save_huggingface',
]
