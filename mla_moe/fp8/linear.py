"""Linear layers whose three products take FP8 operands (V3 section 3.3).

y = x w, dx = g w^T and dw = x^T g each quantise what they multiply by the
current values: no history, no state, so that scan, remat, micro-batches and
checkpoints know nothing of it. A tensor is tiled along the axis that is summed
over, so the activation and the gradient are quantised twice, along channels
and along tokens; a weight's square blocks serve both ways.

For the backward pass an activation is kept as it was multiplied, in FP8 and
under a name that `jax.checkpoint` policies know (SAVED), which halves what a
layer saves wherever nothing else needs the value before quantisation; scales
that are powers of two make its second tiling lossless. Weights may be
quantised once for many calls: `prepare` gives a `Weight`, the master beside
its FP8 copies. The products read the copies, and the gradient is the master's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mla_moe.fp8 import gemm, grouped
from mla_moe.fp8.quantize import Quantized
from mla_moe.fp8.recipe import Recipe
from mla_moe.types import Array, Float, Int

SAVED = 'fp8_input'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
  """A float32 weight and its FP8 copies, for products that only read these.

  Build it outside a loop with `prepare`, and differentiate with respect to
  what was prepared by building it again inside from the master and the old
  copies: `Weight(master, prepared.copies)`. The copies have no gradient.
  """

  master: Any  # specs or shapes may take the arrays' place
  copies: tuple

  @property
  def shape(self) -> tuple[int, ...]:
    return self.master.shape

  @property
  def ndim(self) -> int:
    return self.master.ndim


def prepare(
  w: Float[Array, ' ...'],
  precision: str = 'fp8_block',
  *,
  scales: str = 'pow2',
  lead: int = 0,
) -> Weight:
  """`w` of [lead axes, K, ..., N] with its FP8 copies, `lead` of the first."""
  recipe = Recipe(precision, 'dequant', scales)
  return Weight(w, recipe.weights(w, lead))


def dot(
  x: Float[Array, '... K'],
  w: Float[Array, 'K ...'] | Weight,
  precision: str = 'fp8_block',
  *,
  impl: str = 'auto',
  scales: str = 'pow2',
  keep: str = 'fp8',
  name: str = SAVED,
) -> Float[Array, ' ...']:
  """x w, in the dtype of `x`; the gradient of `w` has the dtype of `w`.

  Args:
    x: [..., K].
    w: [K, N], or [K, G, N]: G products side by side, whose blocks do not cross
      (gate and up). Give the float32 master: its gradient stays float32.
    precision: 'bf16' is a plain dot in the dtype of `x`.
    impl: see `gemm`; 'auto' is the hardware's.
    scales: 'pow2' or 'float32'.
    keep: what the backward pass finds of `x`: 'fp8', a byte a number, or
      'input', `x` itself, which costs nothing where it is kept anyway.
      float32 scales keep the input: tiling twice would round twice.
    name: of what is kept, for policies of `jax.checkpoint`.

  Raises:
    ConfigError: an unknown name, or an `impl` that has no such precision.
  """
  options = {'impl': impl, 'scales': scales, 'keep': keep, 'name': name}
  return dots(x, (w,), precision, **options)[0]


def dots(
  x: Float[Array, '... K'],
  ws: tuple,
  precision: str = 'fp8_block',
  *,
  impl: str = 'auto',
  scales: str = 'pow2',
  keep: str = 'fp8',
  name: str = SAVED,
) -> tuple:
  """`dot` with each weight of `ws`; `x` is quantised, and kept, once."""
  recipe = Recipe(precision, impl, scales, keep)
  for w in ws:
    if w.ndim < 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
      raise ValueError(f'x {x.shape} and w {w.shape} have no product')
  if precision == 'bf16':
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    wide = lambda w: _master(w).astype(x.dtype)
    return tuple(jax.lax.dot_general(x, wide(w), dims) for w in ws)
  if x.ndim == 1:  # the sum over tokens needs an axis of them
    options = {'impl': impl, 'scales': scales, 'keep': keep, 'name': name}
    return tuple(y[0] for y in dots(x[None], ws, precision, **options))
  masters, copies = tuple(map(_master, ws)), tuple(map(_copies, ws))
  return _dots(x, masters, copies, recipe.resolved(), name)


def _master(w):
  return w.master if isinstance(w, Weight) else w


def _copies(w):
  return w.copies if isinstance(w, Weight) else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _dots(x, ws, copies, recipe, name):
  return _dots_forward(x, ws, copies, recipe, name)[0]


def _dots_forward(x, ws, copies, recipe, name):
  q = _named(recipe.rows(x, 1), recipe, name)
  over = ((x.ndim - 1,), (0,))
  each = zip(ws, copies, strict=True)
  right = [(c or recipe.weights(w))[0] for w, c in each]
  ys = tuple(gemm.multiply(q, w, over, recipe.impl, x.dtype) for w in right)
  return ys, (_kept(x, q, recipe), _left(ws, copies), copies)


def _dots_backward(recipe, _, residuals, gs):
  kept, ws, copies = residuals
  x = recipe.columns(kept, 1)
  dx, dws = 0.0, []
  for g, w, c in zip(gs, ws, copies, strict=True):
    own = g.ndim - (x.ndim - 1)
    right = (c or recipe.weights(w))[-1]
    last = tuple(range(g.ndim - own, g.ndim))
    over = (last, tuple(range(1, right.ndim)))
    dx = dx + gemm.multiply(recipe.rows(g, own), right, over, recipe.impl)
    tokens = tuple(range(x.ndim - 1))
    columns = recipe.columns(g, own)
    dw = gemm.multiply(x, columns, (tokens, tokens), recipe.impl)
    dws.append(dw.astype(w.dtype))
  return dx.astype(gs[0].dtype), tuple(dws), None


_dots.defvjp(_dots_forward, _dots_backward)


def _named(q: Quantized, recipe: Recipe, name: str) -> Quantized:
  """`q` under a name that policies know, as bits.

  A policy that saves a float rounds it to its dtype's widths first, and to jax
  4 exponent bits end at 240: what E4M3 has above that would become NaN.
  """
  if recipe.keep == 'input' or recipe.scales != 'pow2':
    return q
  bits = jax.lax.bitcast_convert_type(q.values, jnp.uint8)
  values = jax.lax.bitcast_convert_type(
    checkpoint_name(bits, name), q.values.dtype
  )
  scales = checkpoint_name(q.scales, name)
  return dataclasses.replace(q, values=values, scales=scales)


def _kept(x, q, recipe):
  return x if recipe.keep == 'input' or recipe.scales != 'pow2' else q


def _left(ws, copies):
  """What the backward pass needs of the masters: at least their dtypes."""
  each = zip(ws, copies, strict=True)
  return tuple(jnp.zeros((0,), w.dtype) if c else w for w, c in each)


def ragged_dot(
  x: Float[Array, 'M K'],
  w: Float[Array, 'E K ...'] | Weight,
  group_sizes: Int[Array, ' E'],
  precision: str = 'fp8_block',
  *,
  impl: str = 'auto',
  scales: str = 'pow2',
  keep: str = 'fp8',
  name: str = SAVED,
) -> Float[Array, 'M ...']:
  """Each row of `x` times its expert's weight, [M, N] in the dtype of `x`.

  Rows are sorted by expert: the first group_sizes[0] are expert 0's. Rows
  after the last group give zeros, whatever they hold. `w` is [E, K, N] or
  [E, K, G, N]; the other arguments are those of `dot`.
  """
  recipe = Recipe(precision, impl, scales, keep)
  if x.ndim != 2 or w.ndim < 3 or x.shape[1] != w.shape[1]:
    raise ValueError(f'x {x.shape} and w {w.shape} have no product by expert')
  if precision == 'bf16':
    wide = _master(w).astype(x.dtype)
    flat = wide.reshape(*wide.shape[:2], -1)
    y = jax.lax.ragged_dot(x, flat, group_sizes)
    return y.reshape(x.shape[0], *wide.shape[2:])
  return _ragged(
    x, _master(w), _copies(w), group_sizes, recipe.resolved(), name
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _ragged(x, w, copies, sizes, recipe, name):
  return _ragged_forward(x, w, copies, sizes, recipe, name)[0]


def _ragged_forward(x, w, copies, sizes, recipe, name):
  at = grouped.layout(sizes, x.shape[0])
  rows = grouped.spread_rows(x, at)
  q = _named(recipe.rows(rows, 1), recipe, name)
  right = (copies or recipe.weights(w, 1))[0]
  y = grouped.grouped(q, right, ((1,), (1,)), at, recipe.impl, x.dtype)
  (left,) = _left((w,), (copies,))
  kept = _kept(x, q, recipe)
  return grouped.gather_rows(y, at), (kept, left, copies, sizes)


def _ragged_backward(recipe, _, residuals, g):
  kept, w, copies, sizes = residuals
  at = grouped.layout(sizes, g.shape[0])
  if not isinstance(kept, Quantized):
    kept = grouped.spread_rows(kept, at)
  rows = grouped.spread_rows(g, at)
  own = g.ndim - 1
  right = (copies or recipe.weights(w, 1))[-1]
  over = (tuple(range(1, g.ndim)), tuple(range(2, right.ndim)))
  q = recipe.rows(rows, own)
  dx = grouped.grouped(q, right, over, at, recipe.impl, g.dtype)
  dw = grouped.grouped_weights(
    recipe.columns(kept, 1), recipe.columns(rows, own), at, recipe.impl
  )
  return grouped.gather_rows(dx, at), dw.astype(w.dtype), None, None


_ragged.defvjp(_ragged_forward, _ragged_backward)


@dataclasses.dataclass(frozen=True)
class DotGeneral:
  """`lax.dot_general` in FP8, for `nn.Dense(dot_general=...)`.

  The right operand is the weight. Flax casts it to the layer's dtype first, so
  its gradient is rounded to that dtype: `dot` with the master does better.
  """

  precision: str = 'fp8_block'
  impl: str = 'auto'
  scales: str = 'pow2'
  keep: str = 'fp8'

  def __call__(
    self,
    lhs,
    rhs,
    dimension_numbers,
    precision=None,
    preferred_element_type=None,
    **_,
  ):
    if self.precision == 'bf16':
      return jax.lax.dot_general(
        lhs,
        rhs,
        dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
      )
    (left, right), batch = dimension_numbers
    if any(batch):
      raise ValueError(
        f'an FP8 dot_general has no batch axes, not {batch}; see ragged_dot'
      )
    pairs = sorted(zip(left, right, strict=True))
    left, right = (tuple(axes) for axes in zip(*pairs, strict=True))
    free = lambda x, axes: tuple(d for d in range(x.ndim) if d not in axes)
    rows, columns = free(lhs, left), free(rhs, right)
    x = lhs.transpose(*rows, *left)
    w = rhs.transpose(*right, *columns)
    lead, end = x.shape[: len(rows)], w.shape[len(right) :]
    x = x.reshape(*lead, -1)
    y = dot(
      x,
      w.reshape(x.shape[-1], -1),
      self.precision,
      impl=self.impl,
      scales=self.scales,
      keep=self.keep,
    )
    return y.reshape(*lead, *end).astype(preferred_element_type or y.dtype)
