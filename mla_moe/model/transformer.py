"""The transformer: embedding, dense layers, MoE layers, head, MTP modules.

`Transformer.__call__` gives logits. Training reads `features` instead: the
normed hidden states, so that the loss may make logits block by block and
never whole (`losses.token_nll`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mla_moe import fp8, sharding
from mla_moe.config import ModelConfig
from mla_moe.model import (
  block,
  embedding,
  layers,
  mtp,
  pipeline,
  products,
  rope,
  sequence,
  weights,
)
from mla_moe.types import Array, Float, Int, PyTree


@struct.dataclass
class Features:
  """Hidden states ready for the head, and what the MoE layers report.

  hidden [B, T, D]; mtp_hidden: per module [B, T, D], where position i predicts
  token i + module + 2 and the last module + 1 positions mean nothing; stats
  with a leading axis of MoE layers, mtp_stats with one of modules (None where
  there are none).
  """

  hidden: PyTree
  mtp_hidden: PyTree
  stats: PyTree
  mtp_stats: PyTree


@struct.dataclass
class Output:
  """logits [B, T, V] float32: position i predicts token i+1.

  mtp_logits [depth, B, T-1, V]: position i of module k (from 0) predicts token
  i+k+2, None without MTP; expert_load [MoE layers, E] int32 tokens sent to
  each routed expert, mtp_load [depth, E] likewise.
  """

  logits: PyTree
  mtp_logits: PyTree
  expert_load: PyTree
  mtp_load: PyTree


class Transformer(nn.Module):
  """A DeepSeek-V3-style model."""

  config: ModelConfig

  def setup(self):
    c = self.config
    shape = (c.vocab, c.dim)
    axes = ('vocab', 'embed')
    self.embedding = weights.param(self, 'embedding', shape, axes, c.init_std)
    if not c.tie_embeddings:
      self.w_head = weights.param(
        self, 'w_head', shape[::-1], axes[::-1], c.init_std
      )
    if c.dense_layers:
      self.dense = block.stack(c, False, c.dense_layers, 'dense')
    if c.moe_layers:
      self.moe = block.stack(c, True, c.moe_layers, 'moe')
    self.final_norm = layers.RMSNorm(c.norm_eps)
    self.mtp = [mtp.MTP(c) for _ in range(c.mtp.depth)]

  def head(self) -> Float[Array, 'D V']:
    """The output projection, float32."""
    return self.embedding.T if self.config.tie_embeddings else self.w_head

  def features(
    self,
    tokens: Int[Array, 'B T'],
    positions: Int[Array, 'B T'] | None = None,
    segments: Int[Array, 'B T'] | None = None,
    mask: Float[Array, 'B T'] | None = None,
    micro: int = 0,
  ) -> Features:
    """Everything but the head.

    On a mesh that splits sequences, the hidden states of a row are in the order
    of its devices (`sequence.arrange`).

    Args:
      tokens: ids below the vocabulary; others are clipped by the gather.
      positions: for the rotation; 0..T-1 when None.
      segments: tokens of one row attend within their segment; None is one.
      mask: 0 for tokens that the experts' statistics leave out.
      micro: micro-batches of a pipeline, on a mesh with stages (`pipeline`).
    """
    c = self.config
    b, t = tokens.shape
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    place = lambda x: None if x is None else sequence.arrange(x)
    segments = place(segments)
    cos, sin = rope.angles(place(positions), c.mla.rope_dim, c.mla.rope)
    embed = lambda tokens: embedding.lookup(
      self.embedding, place(tokens), c.dtype
    )
    embedded = embed(tokens)
    x, stats = embedded, None
    if c.dense_layers:
      x, _ = self.dense(x, cos, sin, segments, place(mask))
    if c.moe_layers and pipeline.stages() > 1 and not self.is_initializing():
      assert mask is None
      rows = (x, cos, sin, segments)
      x, stats = pipeline.run(self.moe.variables, c, *rows, micro)
      x = sharding.constrain(x, 'batch', 'length', 'stream')
    elif c.moe_layers:
      x, stats = self.moe(x, cos, sin, segments, place(mask))
    hidden = self.final_norm(x)

    mtp_hidden, mtp_stats, before = [], [], hidden
    for k, module in enumerate(self.mtp, start=1):
      known = (jnp.arange(t) < t - k).astype(jnp.float32)[None]
      known = jnp.broadcast_to(known, (b, t))
      known = known if mask is None else known * mask
      ahead = embed(jnp.roll(tokens, -k, axis=1))
      before, normed, report = module(
        before, ahead, cos, sin, segments, place(known)
      )
      mtp_hidden.append(normed)
      mtp_stats.append(report)
    together = None
    if mtp_stats and c.moe_layers:
      together = jax.tree.map(lambda *x: jnp.stack(x), *mtp_stats)
    return Features(hidden, mtp_hidden, stats, together)

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    positions: Int[Array, 'B T'] | None = None,
    segments: Int[Array, 'B T'] | None = None,
  ) -> Output:
    """Logits of whole sequences."""
    out = self.features(tokens, positions, segments)
    w_head = self.head().astype(self.config.dtype)
    logits = lambda h: products.dot('btd,dv->btv', sequence.restore(h), w_head)
    mtp_logits = None
    if out.mtp_hidden:
      mtp_logits = jnp.stack([logits(h)[:, :-1] for h in out.mtp_hidden])
    return Output(
      logits=logits(out.hidden),
      mtp_logits=mtp_logits,
      expert_load=None if out.stats is None else out.stats.load,
      mtp_load=None if out.mtp_stats is None else out.mtp_stats.load,
    )


def quantised(params: PyTree, config: ModelConfig) -> PyTree:
  """The FP8 copies of every weight of a tree, None for other parameters.

  What `with_copies` takes: made once, they serve many micro-batches.
  """
  recipe = products.recipe(config)
  tokens = jnp.zeros((1, config.mtp.depth + 2), jnp.int32)
  boxed = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)

  def copies(path, box, w):
    if recipe.precision == 'bf16' or path[-1].key not in weights.FP8_WEIGHTS:
      return None
    return weights.quantize(w, box.names, recipe).copies

  is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  return jax.tree_util.tree_map_with_path(
    copies, boxed['params'], params, is_leaf=is_box
  )


def with_copies(params: PyTree, copies: PyTree) -> PyTree:
  """The parameters, with copies where there are any; differentiable."""
  join = lambda w, q: w if q is None else fp8.Weight(w, q)
  return jax.tree.map(join, params, copies)
