"""The costs of a model: parameters, FLOPs, cache, hours and money.

Arithmetic on the config, without JAX. A training step costs 6 FLOPs for each
active matrix parameter and token (2 forward, 4 backward), plus the quadratic
part of causal attention, 3 * 2 * N * (H + R + U) * T/2 for each layer and token
(DeepSeek's "Insights into DeepSeek-V3", Table 2). Published counts leave the
MTP modules out, and so do `total` and `active`; `mtp` counts them.
"""

from __future__ import annotations

import dataclasses

from mla_moe.config import ModelConfig

_BYTES = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 1, 'float8': 1}


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Numbers of parameters.

  `total` is the sum of embedding, head, attention, dense, routed, shared,
  router and norms. `active` leaves out the experts that a token is not sent to.
  `mtp` and `mtp_active` are those of the MTP modules, in addition.
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
  """Returns the matrix and the norm parameters of one attention layer."""
  a, d = model.mla, model.dim
  head = a.nope_dim + a.rope_dim
  query = a.query_rank
  matrices = d * query + query * a.heads * head if query else d * a.heads * head
  matrices += d * (a.kv_rank + a.rope_dim)
  matrices += a.kv_rank * a.heads * (a.nope_dim + a.value_dim)
  matrices += a.heads * a.value_dim * d
  return matrices, query + a.kv_rank


def parameters(config) -> Parameters:
  """Returns the counts of a ModelConfig (or of a Config's model)."""
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
  """Returns the FLOPs to train on one token of a sequence of `seq_len`.

  `mtp` adds the MTP modules, each of which multiplies by the head once more.
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
    module = counts.mtp_active // model.mtp.depth - norms
    module -= bias if model.moe_layers else 0
    matrices += model.mtp.depth * (module + head)
  width = a.nope_dim + a.rope_dim + a.value_dim
  attention = 3 * 2 * a.heads * width * (seq_len / 2) * blocks
  return 6.0 * matrices + attention


def cache_bytes_per_token(config, dtype: str = 'bfloat16') -> int:
  """Returns the cache's bytes for one token: the latent and the shared key."""
  model = _model(config)
  per_layer = model.mla.kv_rank + model.mla.rope_dim
  return per_layer * model.layers * _BYTES[str(dtype)]


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
  """Returns the device hours to train on `tokens`, and their price in dollars.

  The hours are summed over `devices`: a run lasts hours / devices. `peak_flops`
  is the peak of one device in FLOP/s, `utilisation` the fraction of it that is
  reached.
  """
  rate = devices * peak_flops * utilisation
  seconds = tokens * train_flops_per_token(config, seq_len) / rate
  hours = seconds / 3600 * devices
  return hours, hours * dollars_per_hour
