"""What a model costs: parameters, FLOPs, cache, memory, hours and money.

Arithmetic on the config, without JAX. A training step costs 6 FLOPs for each
active matrix parameter and token (2 forward, 4 backward), plus attention's
quadratic part, causal: 3 * 2 * N * (H + R + U) * T/2 a layer and token
(DeepSeek's "Insights into DeepSeek-V3", Table 2). Published counts leave the
MTP modules out, and so do `total` and `active`; `mtp` has them.
"""

from __future__ import annotations

import dataclasses

from mla_moe.config import Config, ModelConfig

_BYTES = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 1, 'float8': 1}


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Numbers of parameters; `routed` and the rest sum to `total`, without mtp.

  `active` is what one token uses: all but the experts that it is not sent to.
  """

  total: int
  active: int
  embedding: int
  head: int
  attention: int
  dense: int
  routed: int
  shared: int
  router: int
  norms: int
  mtp: int
  mtp_active: int


def _model(config) -> ModelConfig:
  return getattr(config, 'model', config)


def _attention(model: ModelConfig) -> tuple[int, int]:
  """Matrix and norm parameters of one attention layer."""
  a, d = model.mla, model.dim
  head = a.nope_dim + a.rope_dim
  query = a.query_rank
  matrices = d * query + query * a.heads * head if query else d * a.heads * head
  matrices += d * (a.kv_rank + a.rope_dim)
  matrices += a.kv_rank * a.heads * (a.nope_dim + a.value_dim)
  matrices += a.heads * a.value_dim * d
  return matrices, query + a.kv_rank


def parameters(config) -> Parameters:
  """Counts of a ModelConfig (or of a Config's model)."""
  model = _model(config)
  moe, d, layers = model.moe, model.dim, model.moe_layers
  matrices, latent_norms = _attention(model)
  expert = 3 * d * moe.width
  gate = moe.experts * (d + (moe.method == 'noaux_tc'))
  embedding = model.vocab * d
  head = 0 if model.tie_embeddings else embedding
  norms = model.layers * (latent_norms + 2 * d) + d
  parts = dict(
    embedding=embedding,
    head=head,
    attention=model.layers * matrices,
    dense=model.dense_layers * 3 * d * model.dense_width,
    routed=layers * moe.experts * expert,
    shared=layers * moe.shared * expert,
    router=layers * gate,
    norms=norms,
  )
  total = sum(parts.values())
  idle = (moe.experts - moe.top_k) * expert
  if layers:
    ffn = gate + (moe.experts + moe.shared) * expert
  else:
    ffn, idle = 3 * d * model.dense_width, 0
  module = 2 * d * d + 3 * d + matrices + latent_norms + 2 * d + ffn
  depth = model.mtp.depth
  return Parameters(
    total=total,
    active=total - layers * idle,
    mtp=depth * module,
    mtp_active=depth * (module - idle),
    **parts,
  )


def train_flops_per_token(config, seq_len: int, mtp: bool = False) -> float:
  """FLOPs to train on one token of sequences of `seq_len`, causal attention.

  `mtp` adds the modules, each of which reads the head once more.
  """
  model = _model(config)
  counts, a = parameters(model), model.mla
  head = model.vocab * model.dim
  bias = model.moe.experts * (model.moe.method == 'noaux_tc')
  matrices = counts.active - counts.embedding - counts.head - counts.norms
  matrices += head - model.moe_layers * bias
  blocks = model.layers
  if mtp and model.mtp.depth:
    blocks += model.mtp.depth
    norms = 5 * model.dim + _attention(model)[1]
    each = counts.mtp_active // model.mtp.depth - norms
    each -= bias if model.moe_layers else 0
    matrices += model.mtp.depth * (each + head)
  width = a.nope_dim + a.rope_dim + a.value_dim
  attention = 3 * 2 * a.heads * width * (seq_len / 2) * blocks
  return 6.0 * matrices + attention


def cache_bytes_per_token(config, dtype: str = 'bfloat16') -> int:
  """Bytes that decoding keeps for one token: the latent and the shared key."""
  model = _model(config)
  per_layer = model.mla.kv_rank + model.mla.rope_dim
  return per_layer * model.layers * _BYTES[str(dtype)]


def training_bytes_per_device(config: Config) -> dict[str, int]:
  """Bytes of state on each device: parameters, gradients, Adam's two moments.

  float32 all; experts are laid over expert, fsdp and tensor, the rest over
  fsdp and tensor. Activations are not in it.
  """
  counts, mesh = parameters(config), config.mesh
  depth_routed = 0
  model = config.model
  if model.moe_layers:
    expert = 3 * model.dim * model.moe.width
    depth_routed = model.mtp.depth * model.moe.experts * expert
  routed = counts.routed + depth_routed
  rest = counts.total + counts.mtp - routed
  shards = mesh.fsdp * mesh.tensor
  held = routed // (shards * mesh.expert) + rest // shards
  return {
    'parameters': 4 * held,
    'gradients': 4 * held,
    'optimizer': 8 * held,
  }


def hours_and_money(
  config,
  tokens: float,
  seq_len: int,
  *,
  devices: int,
  peak_flops: float,
  utilisation: float,
  dollars_per_hour: float,
) -> tuple[float, float]:
  """Device hours to train on `tokens`, and dollars for them.

  `peak_flops` is one device's peak in FLOP/s, `utilisation` the share of it
  that is reached; the hours are summed over `devices` (so their number only
  tells how long one waits: hours / devices).
  """
  rate = devices * peak_flops * utilisation
  seconds = tokens * train_flops_per_token(config, seq_len) / rate
  hours = seconds / 3600 * devices
  return hours, hours * dollars_per_hour
