"""The costs of a model: parameters, FLOPs and cache.

Arithmetic on the config, without JAX. A training step costs 6 FLOPs for each
active matrix parameter and token (2 forward, 4 backward), plus the quadratic
part of causal attention, 3 * 2 * N * (H + R + U) * T/2 for each layer and token
(DeepSeek's "Insights into DeepSeek-V3", Table 2). Published counts leave the
MTP modules out, and so do `total` and `active`; `mtp` counts them. An indexer
scores all keys forward; backward its loss touches those of its sets.
"""

from __future__ import annotations

import dataclasses

from mla_moe.config import ModelConfig

_BYTES = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 1, 'float8': 1}


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Numbers of parameters.

  `total` is the sum of embedding, head, attention, dense, routed, shared,
  router, norms, indexer. `active` leaves out the experts that a token skips.
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
  indexer: int
  mtp: int
  mtp_active: int


def _model(config) -> ModelConfig:
  return getattr(config, 'model', config)


def _attention(model: ModelConfig) -> tuple[int, int]:
  """Returns the matrix and the norm parameters of one attention layer."""
  a, d = model.mla, model.dim
  head = a.nope_dim + a.rope_dim
  if model.attention == 'gqa':
    return d * (a.heads + model.kv_heads) * (head + a.value_dim), 0
  query = a.query_rank
  matrices = d * query + query * a.heads * head if query else d * a.heads * head
  matrices += d * (a.kv_rank + a.rope_dim)
  matrices += a.kv_rank * a.heads * (a.nope_dim + a.value_dim)
  matrices += a.heads * a.value_dim * d
  return matrices, query + a.kv_rank


def _indexer(model: ModelConfig) -> tuple[int, int, int]:
  """Returns an indexer's matrices and norm, and the layers that have one."""
  dsa = model.dsa
  if not dsa.heads:
    return 0, 0, 0
  source = model.mla.query_rank if dsa.q_from == 'latent' else model.dim
  matrices = source * dsa.heads * dsa.dim + model.dim * (dsa.dim + dsa.heads)
  return matrices, 2 * dsa.dim, model.layers - dsa.types.count('shared')


def parameters(config) -> Parameters:
  """Returns the counts of a ModelConfig (or of a Config's model)."""
  model = _model(config)
  moe, d, layers = model.moe, model.dim, model.moe_layers
  matrices, latent_norms = _attention(model)
  index, index_norm, indexers = _indexer(model)
  expert = 3 * d * moe.width
  gate = moe.experts * (d + (moe.method == 'noaux_tc'))
  embedding = model.vocab * d
  head = 0 if model.tie_embeddings else embedding
  parts = dict(
    embedding=embedding,
    head=head,
    attention=model.layers * matrices,
    dense=model.dense_layers * 3 * d * model.dense_width,
    routed=layers * moe.experts * expert,
    shared=layers * moe.shared * expert,
    router=layers * gate,
    norms=model.layers * (latent_norms + 2 * d) + d,
    indexer=indexers * (index + index_norm),
  )
  total = sum(parts.values())
  idle = (moe.experts - moe.top_k) * expert
  if layers:
    ffn = gate + (moe.experts + moe.shared) * expert
  else:
    ffn, idle = 3 * d * model.dense_width, 0
  norms = latent_norms + index_norm + 5 * d
  module = 2 * d * d + matrices + index + norms + ffn
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

  `mtp` adds the MTP modules, each of which multiplies by the head once more. Of
  a run that trains its indexers alone, all else goes forward only.
  """
  model = _model(config)
  counts, a = parameters(model), model.mla
  head = model.vocab * model.dim
  bias = model.moe.experts * (model.moe.method == 'noaux_tc')
  matrices = counts.active - counts.embedding - counts.head - counts.norms
  matrices += head - counts.indexer - model.moe_layers * bias
  index, index_norm, indexers = _indexer(model)
  blocks = model.layers
  if mtp and model.mtp.depth:
    blocks += model.mtp.depth
    indexers += model.mtp.depth * (index > 0)
    norms = 5 * model.dim + _attention(model)[1] + index + index_norm
    module = counts.mtp_active // model.mtp.depth - norms
    module -= bias if model.moe_layers else 0
    matrices += model.mtp.depth * (module + head)
  width = a.nope_dim + a.rope_dim + a.value_dim
  attention = 3 * 2 * a.heads * width * (seq_len / 2)
  if index:
    keys = read_keys(model, seq_len)
    absorbed = 2 * a.kv_rank + a.rope_dim
    attention = min(attention, 3 * 2 * a.heads * absorbed * keys)
    # Its input has no gradient: a matrix costs 4 FLOPs, not 6.
    index = 4.0 * index + index_flops(model, seq_len / 2 + 2 * keys)
  trunk = 6.0 * matrices + attention * blocks
  if getattr(getattr(config, 'optim', None), 'trains', 'all') == 'indexer':
    trunk /= 3
  return trunk + index * indexers


def read_keys(model: ModelConfig, seq_len: float) -> float:
  """Returns the keys that attention reads, on average over the positions."""
  is_sparse = model.dsa.heads and model.dsa.attention == 'sparse'
  read = min(model.dsa.topk, seq_len) if is_sparse else seq_len
  return read - read**2 / (2 * seq_len) if seq_len else 0.0


def index_flops(model: ModelConfig, keys: float) -> float:
  """Returns the FLOPs of one layer's index scores of so many keys."""
  return 2 * model.dsa.heads * (model.dsa.dim + 1) * keys


def cache_bytes_per_token(config, dtype: str = 'bfloat16') -> int:
  """Returns the cache's bytes for one token: latents, shared and index keys."""
  model = _model(config)
  numbers = sum(cached(model)) * model.layers
  numbers += model.dsa.dim * _indexer(model)[2]
  return numbers * _BYTES[str(dtype)]


def cached(model: ModelConfig) -> tuple[int, int]:
  """Returns the numbers of a latent and of a shared key, or GQA's row and 0."""
  a = model.mla
  if model.attention == 'mla':
    return a.kv_rank, a.rope_dim
  return model.kv_heads * (a.nope_dim + a.rope_dim + a.value_dim), 0
