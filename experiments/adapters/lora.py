"""LoRA as a pure function: a model's parameters from a base and adapters.

`join(base, adapters)` is a tree that `Transformer` takes in the place of its
parameters: each adapted weight is a `Frozen` with its A and s B, where s is
alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023). Training
differentiates it by the adapters alone, so that optimizer and checkpoints hold
nothing else. B begins at zero: the first step's model is the base, to the bit.
LoRA+ (Hayou et al. 2024) has a larger rate for B. The length of Adam's steps
is not that of gradients: B = plus B', with B' at the rate of A, is the same.

There is one adapter for each matrix of a release, under its name there, so that
PEFT's files hold the same numbers. Our two leaves of one matrix (the latent and
its rotated key; keys and values) share A. Gate and up of an expert do so, too,
because transformers 5 has them in one matrix; those of an MLP do not. MTP
modules, which it does not have, get no adapters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from mla_moe import sharding
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.model import transformer, weights
from mla_moe.types import Array, PyTree
from mla_moe.use_config import LORA_GROUPS

from .frozen import GROUPS, Frozen, Merged

# The leaves of each matrix of a release; gate and up are two of an MLP.
MATRICES = {
  'q_proj': ('w_q',),
  'q_a_proj': ('w_q_down',),
  'q_b_proj': ('w_q_up',),
  'kv_a_proj_with_mqa': ('w_kv_down', 'w_k_rope'),
  'kv_b_proj': ('w_k_up', 'w_v_up'),
  'o_proj': ('w_out',),
  'gate_up_proj': ('w_gate_up',),
  'down_proj': ('w_down',),
}
_LEAD = ('layers', 'routed_layers', 'experts')


@functools.lru_cache(16)
def boxed_parameters(model: ModelConfig) -> PyTree:
  """Returns the shapes of a model's parameters, boxed with logical axes."""
  tokens = jnp.zeros((1, model.mtp.depth + 2), jnp.int32)
  init = transformer.Transformer(model).init
  return jax.eval_shape(init, jax.random.key(0), tokens)['params']


@functools.lru_cache(16)
def boxed_base(model: ModelConfig, dtype: str) -> PyTree:
  """Returns the shapes of the frozen base, boxed with logical axes.

  `dtype` is that of the leaves that are not quantised: embedding, head, norms
  and router, and the codes of every matrix under `base='trained'`.

  Raises:
    ConfigError: an odd length that int4 would cut.
  """

  def one(path, box):
    name, axes = path[-1].key, box.names
    if name not in weights.FP8_WEIGHTS:
      return box.replace_boxed(jax.ShapeDtypeStruct(box.value.shape, dtype))
    kind = 'float' if model.base == 'trained' else model.base
    return _boxed_frozen(name, box.value.shape, axes, kind, dtype)

  is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  params = boxed_parameters(model)
  return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_box)


def _boxed_frozen(name, shape, axes, kind, dtype) -> Frozen:
  axes = sharding.over_fsdp(axes)
  flat, names = weights.flat(axes, shape), weights.flat(axes, axes)
  k, ends = sum(a in _LEAD for a in axes), _ends(axes, shape)
  columns = len(flat) - k - 1
  if kind == 'int4' and flat[k] % 2:
    raise ConfigError(
      f"model.base='int4': {name} sums over {flat[k]} numbers, and two of them "
      "are a byte; use 'int8'"
    )
  bits, scale = {
    'fp8': (jnp.uint8, jnp.float32),
    'int8': (jnp.int8, jnp.float32),
    'int4': (jnp.uint8, jnp.uint16),
    'float': (dtype, None),
  }[kind]

  def box(length, dtype, axis):
    own = (*flat[:k], length, *flat[k + 1 :])
    value = jax.ShapeDtypeStruct(own, dtype)
    return nn.LogicallyPartitioned(value, (*names[:k], axis, *names[k + 1 :]))

  codes = box(flat[k] // (1 + (kind == 'int4')), bits, names[k])
  if kind == 'float':
    return Frozen(codes, None, None, None, kind, ends, columns)
  # Groups are whole on every device that has a part of their numbers.
  scales = box(-(-flat[k] // GROUPS[kind]), scale, None)
  return Frozen(codes, scales, None, None, kind, ends, columns)


def _ends(axes: tuple, shape: tuple) -> tuple[int, ...]:
  k = sum(a in _LEAD for a in axes)
  return tuple(shape[k + (2 if axes[k] == 'heads' else 1) :])


def targets(model: ModelConfig) -> set[str]:
  """Returns the adapted matrices; those of experts begin with 'experts.'.

  Raises:
    ConfigError: one that the model does not have.
  """
  low = ('q_a_proj', 'q_b_proj') if model.mla.query_rank else ('q_proj',)
  mla = (*low, 'kv_a_proj_with_mqa', 'kv_b_proj', 'o_proj')
  mlp = 'gate_up_proj', 'down_proj'
  groups = dict(
    attention=mla, mlp=mlp, experts=tuple(f'experts.{name}' for name in mlp)
  )
  out = set()
  for name in model.lora.targets:
    if name not in (*LORA_GROUPS, *mla):
      raise ConfigError(
        f'model.lora.targets: {name!r} is no product of this model; there are '
        f'{", ".join((*LORA_GROUPS, *mla))}'
      )
    out |= set(groups.get(name, (name,)))
  return out


@functools.lru_cache(16)
def boxed_shapes(model: ModelConfig) -> PyTree:
  """Returns the shapes of `boxed`, whose errors it raises."""
  return jax.eval_shape(lambda key: boxed(key, model), jax.random.key(0))


def boxed(key: Array, model: ModelConfig) -> PyTree:
  """Returns fresh adapters, boxed: A uniform in 1 / sqrt(K), B zero.

  Raises:
    ConfigError: a rank above that of a matrix, or another target.
  """
  adapted = targets(model)

  def walk(tree, key):
    out = {}
    children = [name for name in sorted(tree) if isinstance(tree[name], dict)]
    children = [name for name in children if not name.startswith('mtp_')]
    for i, name in enumerate(children):
      inside = walk(tree[name], jax.random.fold_in(key, i))
      out |= {name: inside} if inside else {}
    experts = 'experts.' if 'w_router' in tree else ''
    for i, (name, leaves) in enumerate(MATRICES.items(), len(children)):
      if leaves[0] in tree and f'{experts}{name}' in adapted:
        boxes = {leaf: tree[leaf] for leaf in leaves}
        out[name] = _fresh(jax.random.fold_in(key, i), name, boxes, model)
    return out

  return walk(boxed_parameters(model), key)


def _fresh(key, name, boxes, model) -> PyTree:
  """Returns the boxed A and B of one matrix of a release."""
  rank = model.lora.rank
  first = next(iter(boxes.values()))
  shape, names = (
    weights.flat(first.names, x) for x in (first.value.shape, first.names)
  )
  names = sharding.over_fsdp(names)
  is_expert = 'experts' in names
  k = sum(a in _LEAD for a in names)
  lead, axes = shape[:k], names[:k]
  if is_expert and model.lora.experts == 'shared':
    lead, axes = (*lead[:-1], 1), (*axes[:-1], None)
  # Gate and up of an MLP are two matrices, side by side in our leaf.
  pair = (2,) if name == 'gate_up_proj' and not is_expert else ()
  width = sum(
    math.prod(weights.flat(b.names, b.value.shape)[k + 1 + len(pair) :])
    for b in boxes.values()
  )
  if rank > min(shape[k], width):
    raise ConfigError(
      f'model.lora.rank={rank}: {name} is a matrix {shape[k]} x {width}, of no '
      'higher rank than its shorter side'
    )
  bound = shape[k] ** -0.5
  of_a = (*lead, shape[k], *pair, rank)
  a = jax.random.uniform(key, of_a, jnp.float32, -bound, bound)
  box = nn.LogicallyPartitioned
  none = (None,) * len(pair)
  out = {'a': box(a, (*axes, names[k], *none, None))}
  for leaf, b in boxes.items():
    tail = weights.flat(b.names, b.value.shape)[k + 1 + len(pair) :]
    last = weights.flat(b.names, b.names)[k + 1 + len(pair) :]
    zeros = jnp.zeros((*lead, *pair, rank, *tail), jnp.float32)
    out[leaf] = box(zeros, (*axes, *none, None, *last))
  return out


def b_scale(model: ModelConfig) -> float:
  """Returns s of s A B: alpha over the rank or its root."""
  lora = model.lora
  return lora.alpha / lora.rank ** (1.0 if lora.scale == 'rank' else 0.5)


def join(base: PyTree, adapters: PyTree, model: ModelConfig) -> PyTree:
  """Returns the parameters of a base with adapters; differentiable by these.

  Args:
    base: {'dense', 'moe', ...}, of arrays or `Frozen`.
    adapters: as `boxed` makes them, without their boxes.
    model: its `lora` has the scale of B.
  """
  if not model.lora.rank:  # these are the parameters
    return adapters
  axes = boxed_parameters(model)
  scale = b_scale(model) * model.lora.plus

  def walk(base, own, axes):
    out = {}
    for name, w in base.items():
      if isinstance(w, Mapping):
        out[name] = walk(w, own.get(name, {}), axes[name])
      else:
        is_product = name in weights.FP8_WEIGHTS
        out[name] = _as_frozen(w, axes[name]) if is_product else w
    for name in MATRICES.keys() & own.keys():
      inside = own[name]
      for leaf in MATRICES[name]:
        a, b = inside['a'], scale * inside[leaf]
        if a.ndim == b.ndim and leaf == 'w_gate_up':
          a, b = _side_by_side(a, b)
        out[leaf] = dataclasses.replace(out[leaf], a=a, b=b)
    return out

  return walk(base, adapters, axes)


def merged(params: PyTree, model: ModelConfig) -> PyTree:
  """Returns joined parameters for `save_huggingface`, each merged as written.

  A frozen leaf becomes a `Merged`: no whole leaf of floats is ever there.
  """
  like = nn.unbox(boxed_parameters(model))
  is_frozen = lambda w: isinstance(w, Frozen)
  one = lambda w, like: Merged(w, like.shape) if is_frozen(w) else w
  return jax.tree.map(one, params, like, is_leaf=is_frozen)


def _as_frozen(w: Array | Frozen, box) -> Frozen:
  if isinstance(w, Frozen):
    return w
  shape = weights.flat(box.names, w.shape)
  ends = _ends(box.names, w.shape)
  columns = len(shape) - 1 - sum(a in _LEAD for a in box.names)
  return Frozen(w.reshape(shape), None, None, None, 'float', ends, columns)


def _side_by_side(a, b) -> tuple[Array, Array]:
  """Returns one A and B of gate's and up's: [K, 2, r] to [K, 2 r]."""
  gate, up = (b.take(i, -3)[..., None, :] for i in (0, 1))
  zeros = jnp.zeros_like(gate)
  rows = [jnp.concatenate(x, -2) for x in ((gate, zeros), (zeros, up))]
  return a.reshape(*a.shape[:-2], -1), jnp.concatenate(rows, -3)
