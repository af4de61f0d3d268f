"""DeepSeek-V3-style models in JAX and Flax: MLA, fine-grained MoE, MTP.

    from mla_moe import Transformer, generate, load_huggingface, train_step

Importing this package does nothing else: no flags, no logging, no devices.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mla_moe import cost, fp8
from mla_moe.config import CacheConfig, Config, ConfigError, ModelConfig
from mla_moe.decode.generation import generate, rollout
from mla_moe.hf.load import load_huggingface
from mla_moe.hf.save import save_huggingface
from mla_moe.model.block import Functions
from mla_moe.model.trace import Trace, trace
from mla_moe.model.transformer import Output, Transformer

if TYPE_CHECKING:
  from mla_moe.train.state import init_state
  from mla_moe.train.step import predictions, pretraining, train_step

# Imported at their first use: optax doubles the modules, and not all train.
_TRAINING = dict.fromkeys(('predictions', 'pretraining', 'train_step'), 'step')
_TRAINING['init_state'] = 'state'

__all__ = [
  'CacheConfig',
  'Config',
  'ConfigError',
  'Functions',
  'ModelConfig',
  'Output',
  'Trace',
  'Transformer',
  'cost',
  'fp8',
  'generate',
  'init_state',
  'load_huggingface',
  'predictions',
  'pretraining',
  'rollout',
  'save_huggingface',
  'trace',
  'train_step',
]


def __getattr__(name: str) -> Any:
  if name not in _TRAINING:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'mla_moe.train.{_TRAINING[name]}')
  return getattr(module, name)
