"""The two stages in which a sparse model is trained (V3.2, section 2.1).

The dense warm-up trains the indexer alone, from the attention over all keys:
`trained` leaves the optimizer no other parameter. In the sparse stage no
parameter has gradients of both losses. So each has a norm of its own to be
clipped by, else the larger loss would slow the other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from mla_moe.config import OptimConfig
from mla_moe.model import sparse
from mla_moe.types import Array, PyTree

_INDEXER = 'indexer'  # the name of its parameters in a layer


def trained(params: PyTree, config: OptimConfig) -> PyTree:
  """Returns the parameters that this run trains, without the others' keys."""
  if config.trains == 'all':
    return params
  if not isinstance(params, dict):
    return None
  part = lambda k, v: v if k == _INDEXER else trained(v, config)
  inner = {k: part(k, v) for k, v in params.items()}
  return {k: v for k, v in inner.items() if v} or None


def merged(part: PyTree, params: PyTree) -> PyTree:
  """Returns the parameters with those of `part` in them."""
  if not isinstance(part, dict):
    return part
  return params | {k: merged(v, params.get(k, {})) for k, v in part.items()}


def clipped(grads: PyTree, clip: float) -> tuple[PyTree, dict[str, Array]]:
  """Returns float32 gradients of at most the norm `clip`, and the norms.

  They are those before clipping: `grad_norm`, and without the indexers, whose
  norm is `index_grad_norm` where there are any. They are summed in float32.
  """
  leaves, tree = jax.tree_util.tree_flatten_with_path(grads)
  is_own = lambda path: any(p.key == _INDEXER for p in path)
  name = lambda path: 'index_grad_norm' if is_own(path) else 'grad_norm'
  leaves = [(name(path), g.astype(jnp.float32)) for path, g in leaves]
  norm = lambda key: optax.tree.norm([g for group, g in leaves if group == key])
  norms = {key: norm(key) for key in {'grad_norm': 0} | dict(leaves)}
  factor = {k: jnp.minimum(1.0, clip / (n + 1e-12)) for k, n in norms.items()}
  return tree.unflatten([g * factor[group] for group, g in leaves]), norms


def index_metrics(
  report: sparse.Report | None, read: Array, part: Array
) -> dict[str, Array]:
  """Returns a micro-batch's part of the metrics of the layers [L].

  `index_kl` is the loss in nats a token, `index_mass` the attention that the
  sets keep over the most that sets could, `index_overlap` the share of a set
  that the layer before selects, too. `read` and `part` are `step.Whole`'s.
  """
  if report is None:
    return {}
  before = jnp.concatenate([report.sets[:1], report.sets[:-1]])

  def one(pair):
    own, other = pair  # [B, rows, K], -1 an empty slot
    both = (own[..., None] == other[..., None, :]).any(-1) & (own >= 0)
    return both.sum() / jnp.maximum((own >= 0).sum(), 1)

  return {
    'index_kl': report.kl / read,
    'index_mass': report.mass * part,
    'index_overlap': jax.lax.map(one, (report.sets, before)) * part,
  }
