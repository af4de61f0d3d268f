"""The memory and the seconds of rollouts, and of their scores, by arithmetic.

Between two updates the policy answers `rl.prompts` questions, `rl.samples`
times each. Gradients and residuals are not there then. In their place a device
has the weights in the layout of decoding and the latents of its rows. The
surprising part is the attention: a token reads all tokens before it, which
costs 2 N (2 C + R) FLOPs for each of them and layer in the absorbed form (N
heads, C latents, R rotated), and with answers of 32,768 tokens that is most of
the work. Sparse attention reads its set, and the index keys of all.

All answers count as `rl.max_new` tokens long, and a row as data.seq_len.
"""

from __future__ import annotations

import dataclasses
import math

from mla_moe import cost, sharding
from mla_moe.config import Config, DSAConfig, MeshConfig

from .. import chips

_WIDTH = {'float32': 4, 'bfloat16': 2}  # bytes of a number


def rows_here(config: Config) -> int:
  """Returns the answers that a device draws at a time.

  Rows are split like a batch, or are all on each device if they do not divide.
  """
  rows, parts = _rows(config), shards(config.mesh)
  return rows // parts if rows % parts == 0 else rows


def weights_bytes(config: Config, parameters: int) -> int:
  """Returns bytes of the main model's weights in the layout of decoding.

  They have the activations' width; a device's `parameters` are float32 bytes.
  """
  counts = cost.parameters(config)
  main = counts.total / (counts.total + counts.mtp)
  return int(parameters * main * _WIDTH[config.model.dtype] / 4)


def cache_bytes(config: Config) -> int:
  """Returns bytes of the latents of a device's rows, prompt and answer.

  They are bfloat16 on any accelerator. A TPU has a ninth more of V3's, whose
  576 numbers become 640.
  """
  token = cost.cache_bytes_per_token(config)
  return rows_here(config) * config.data.seq_len * token


def record_bytes(config: Config, rows: int) -> int:
  """Returns bytes of the experts that `rl.replay` notes of rows of tokens."""
  model = config.model
  if config.rl.replay == 'none':
    return 0
  choices = (model.layers - model.dense_layers) * model.moe.top_k
  return 2 * rows * config.data.seq_len * choices


def seconds(
  config: Config, chip: chips.Chip, utilisation: float, weights: int
) -> float:
  """Returns the seconds in which a device answers all questions of a rollout.

  `weights` are the bytes of a device's weights as decoding reads them.
  A pass over the rows takes as long as its FLOPs at `utilisation` of the peak,
  or as reading weights and latents once, if that is longer. Traffic between
  devices is not in it.
  """
  rl = config.rl
  prompt = max(config.data.seq_len - rl.max_new, 0)
  length = prompt + rl.max_new / 2  # of a row, on average
  rows = rows_here(config)
  flops = rows * answer_flops_per_token(config, length)
  flops *= shards(config.mesh) / config.mesh.devices  # tensor, context
  latents = rows * read_bytes_per_token(config, length)
  reading = (weights + latents) / chip.bandwidth
  step = max(flops / (chip.bf16 * utilisation), reading)
  times = math.ceil(rl.prompts * rl.samples / _rows(config))
  # A prompt is read once for all its answers: a third of a training step's.
  read = cost.train_flops_per_token(config, prompt) / 3 * prompt * rl.prompts
  read /= config.mesh.devices * chip.bf16 * utilisation
  return times * rl.max_new * step + read


def answer_flops_per_token(config: Config, length: float) -> float:
  """Returns the FLOPs of one more token after `length` ones."""
  model = config.model
  a, dsa = model.mla, model.dsa
  counts = cost.parameters(model)
  indexers = model.layers - dsa.types.count('shared') if dsa.heads else 0
  matrices = cost.train_flops_per_token(config, 0) / 3
  # Backward an index costs no gradient of its input.
  matrices += (2 - 4 / 3) * (counts.indexer - indexers * 2 * dsa.dim)
  if model.attention == 'mla':
    key_and_value = 2 * a.kv_rank + a.rope_dim
  else:
    key_and_value = a.nope_dim + a.rope_dim + a.value_dim
  attention = 2 * a.heads * key_and_value * model.layers
  read = min(length, dsa.topk) if dsa.heads else length
  return (
    attention * read + indexers * cost.index_flops(model, length) + matrices
  )


def read_bytes_per_token(config: Config, length: float) -> float:
  """Returns the bytes of cache that one more token reads after `length`."""
  model = config.model
  whole = cost.cache_bytes_per_token(config)
  index = whole - cost.cache_bytes_per_token(
    dataclasses.replace(model, dsa=DSAConfig())
  )
  read = min(length, model.dsa.topk) if model.dsa.heads else length
  return index * length + (whole - index) * read


def scoring(config: Config) -> float:
  """Returns the FLOPs of the scores of an update, of those of its training.

  A forward pass is a third. The reference needs one, and so does the old policy
  in all updates of a rollout but the first, or in all where teachers or routes
  of its own are compared with it. A teacher counts as large as the policy.
  """
  rl = config.rl
  is_old = rl.teachers or rl.replay == 'train'
  old = 1 if is_old else 1 - 1 / rl.minibatches
  return (bool(rl.beta) + len(rl.teachers) + old) / 3


def _rows(config: Config) -> int:
  rl = config.rl
  return min(rl.rows or rl.prompts * rl.samples, rl.prompts * rl.samples)


def shards(mesh: MeshConfig) -> int:
  """Returns the parts into which a mesh splits a batch."""
  return math.prod(getattr(mesh, a) for a in sharding.spec(('batch',))[0])
