"""The transformer: embedding, dense layers, MoE layers, head, MTP modules.

`Transformer.__call__` returns logits. Training reads the normed hidden states
instead (`features`), so that the loss makes logits block by block and never
whole (`losses.token_nll`): they would be a step's largest array.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mla_moe import fp8, sharding
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.model import (
  block,
  embedding,
  indexer,
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
  """Hidden states ready for the head, and the reports of the MoE layers.

  hidden: [B, T, D]; position i predicts token i + 1.
  mtp_hidden: a list with [B, T, D] for each module k (from 0); position i
    predicts token i + k + 2, and the last k + 1 positions mean nothing.
  stats: `moe.Stats` with a leading axis of MoE layers, or None.
  mtp_stats: `moe.Stats` with a leading axis of modules, or None.
  routes: the routers' own choices [L, B, T, K], beside a replay; or None.
  index: `sparse.Report` with a leading axis of all layers, those of the MTP
    modules last; or None.
  """

  hidden: PyTree
  mtp_hidden: PyTree
  stats: PyTree
  mtp_stats: PyTree
  routes: PyTree
  index: PyTree = None


@struct.dataclass
class Output:
  """Logits of whole sequences, and the tokens sent to each expert.

  logits: [B, T, V] float32; position i predicts token i + 1.
  mtp_logits: [depth, B, T-1, V] float32; position i of module k (from 0)
    predicts token i + k + 2. None without MTP.
  expert_load: [MoE layers, E] int32, tokens sent to each routed expert.
  mtp_load: [depth, E] int32, likewise for the modules.
  """

  logits: PyTree
  mtp_logits: PyTree
  expert_load: PyTree
  mtp_load: PyTree


class Transformer(nn.Module):
  """A DeepSeek-V3-style model; variables are `params` and `router` (biases)."""

  config: ModelConfig
  functions: block.Functions = block.Functions()  # of each layer

  def setup(self):
    c, own = self.config, self.functions
    if not c.vocab:
      raise ConfigError("vocab=0: is a tokenizer's; `freeze` reads its size")
    shape, axes, std = (c.vocab, c.dim), ('vocab', 'embed'), c.init_std
    self.embedding = weights.param(self, 'embedding', shape, axes, std)
    if not c.tie_embeddings:
      self.w_head = weights.param(self, 'w_head', shape[::-1], axes[::-1], std)
    if c.dense_layers:
      self.dense = block.stack(c, False, own)
    if c.moe_layers:
      self.moe = block.stack(c, True, own)
    self.final_norm = layers.RMSNorm(c.norm_eps)
    self.mtp = [mtp.MTP(c, own) for _ in range(c.mtp.depth)]

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    positions: Int[Array, 'B T'] | None = None,
    segments: Int[Array, 'B T'] | None = None,
  ) -> Output:
    """Returns the logits of whole sequences; the arguments of `features`."""
    out = self.features(tokens, positions, segments)
    w_head = self.head().astype(self.config.dtype)
    logits = lambda h: products.dot('btd,dv->btv', h, w_head)
    mtp_logits = None
    if out.mtp_hidden:
      mtp_logits = jnp.stack([logits(h)[:, :-1] for h in out.mtp_hidden])
    return Output(
      logits=logits(out.hidden),
      mtp_logits=mtp_logits,
      expert_load=None if out.stats is None else out.stats.load,
      mtp_load=None if out.mtp_stats is None else out.mtp_stats.load,
    )

  def head(self) -> Float[Array, 'D V']:
    """Returns the output projection, float32."""
    return self.embedding.T if self.config.tie_embeddings else self.w_head

  def features(
    self,
    tokens: Int[Array, 'B T'],
    positions: Int[Array, 'B T'] | None = None,
    segments: Int[Array, 'B T'] | None = None,
    micro_batches: int = 0,
    arranged: bool = False,
    routes: Int[Array, 'L B T K'] | None = None,
  ) -> Features:
    """Returns everything but the head's logits.

    Args:
      tokens: ids; those beyond the vocabulary are clipped by the gather.
      positions: for the rotation; 0..T-1 when None.
      segments: numbers of documents, below 2**20 (`flash.visible`): tokens of a
        row attend within theirs, and no expert counts those of a negative one.
      micro_batches: of a pipeline (0: one a stage), on a mesh with stages.
      arranged: leave rows in the order of their devices (`sequence.arrange`).
      routes: experts to replay in each MoE layer, in that order (`replay`).
    """
    c = self.config
    b, t = tokens.shape
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    documents, mask = None, None
    if segments is not None:
      documents = sequence.arrange(segments)
      mask = (documents >= 0) * 1.0
    positions = sequence.arrange(positions)
    angles = rope.angles(positions, c.mla.rope_dim, c.mla.rope)
    context = angles, documents
    x, sets = self._embed(tokens), indexer.no_sets(tokens, c.dsa)
    stats, own, index = None, None, []
    if c.dense_layers:
      (x, sets), reports = self.dense((x, sets), *context, None, None)
      index.append(reports.index)
    run_stages = pipeline.takes(b, micro_batches) and not self.is_initializing()
    if c.moe_layers and run_stages:
      args = self.moe.variables, c, x, *context, micro_batches
      x, stats = pipeline.run(*args, self.functions)
      x = sharding.constrain(x, 'batch', 'length', 'stream')
    elif c.moe_layers:
      sets = indexer.enter(sets, c.dense_layers, c.dsa)
      (x, _), (stats, own, of_moe) = self.moe((x, sets), *context, mask, routes)
      index.append(of_moe)
    hidden = self.final_norm(x)
    args = tokens, segments, hidden, context
    ahead, mtp_stats, of_mtp = self._predict_ahead(*args)
    index = jax.tree.map(lambda *x: jnp.concatenate(x), *index, *of_mtp)
    if not arranged:
      hidden, ahead = jax.tree.map(sequence.restore, (hidden, ahead))
    return Features(hidden, ahead, stats, mtp_stats, own, index)

  def _embed(self, tokens):
    arranged = sequence.arrange(tokens)
    return embedding.lookup(self.embedding, arranged, self.config.dtype)

  def _predict_ahead(self, tokens, segments, hidden, context):
    """Returns the MTP modules' hidden states, stats and index reports."""
    outputs, stats, index, x = [], [], [], hidden
    b, t = tokens.shape
    for k, module in enumerate(self.mtp, start=1):
      # A document's last k tokens have no successor: no expert counts them.
      inside = jnp.broadcast_to(jnp.arange(t) < t - k, (b, t))
      if segments is not None:
        same = jnp.roll(segments, -k, axis=1) == segments
        inside = inside & same & (segments >= 0)
      ahead = self._embed(jnp.roll(tokens, -k, axis=1))
      inside = sequence.arrange(inside * 1.0)
      x, normed, reports = module(x, ahead, *context, inside)
      outputs.append(normed)
      stats.append(reports.stats)
      index.append(jax.tree.map(lambda x: x[None], reports.index))
    if not stats or not self.config.moe_layers:
      return outputs, None, index
    return outputs, jax.tree.map(lambda *x: jnp.stack(x), *stats), index


def fp8_copies(params: PyTree, config: ModelConfig) -> PyTree:
  """Returns the FP8 copies of every weight of a tree, None at the other leaves.

  Made once, they serve many micro-batches (`with_copies`).
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
  """Returns the parameters joined with their copies; differentiable."""
  join = lambda w, q: w if q is None else fp8.Weight(w, q)
  return jax.tree.map(join, params, copies)
