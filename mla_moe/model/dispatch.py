"""Rows of tokens sorted by expert and brought back, by gathers alone.

Each token has K experts, so M tokens make A = M * K assignments; assignment
token * K + k is the token's k-th choice. Sorted by expert, the assignments are
the rows of grouped products. Bringing a token's vector to its rows is a gather,
and so is adding its rows up again, because a `Layout` knows both directions.
The gradients, written by hand, are gathers too: no scatter-add, which is slow
on accelerators.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mla_moe.types import Array, Float, Int

# Saved for the backward pass unless remat is 'full': sorting again costs more
# than a few numbers a token.
SAVED = ('dispatch',)


class Order(NamedTuple):
  """Assignments sorted by expert."""

  assignments: Array  # [A] int32: the assignment at each sorted position
  positions: Array  # [A] int32: the sorted position of each assignment
  sizes: Array  # [E] int32
  starts: Array  # [E] int32: the position of the expert's first assignment


class Layout(NamedTuple):
  """The assignment of each row of a buffer, and the row of each assignment."""

  assignments: Array  # [R] int32
  valid: Array  # [R] bool: False for padding, whose assignment means nothing
  rows: Array  # [A] int32
  present: Array  # [A] bool: False where the buffer has no row for it


def capacity(expected: int, multiple: int) -> int:
  """Returns the rows of a buffer: 1.5 times `expected`, up to a multiple.

  Rows beyond it take a slower way; none is dropped.
  """
  return -(-3 * expected // (2 * multiple)) * multiple


def sort(chosen: Int[Array, 'M K'], experts: int) -> Order:
  """Returns the assignments in stable order of their experts.

  The id `experts` stands for an expert of another device. Such assignments come
  last and are in no group.
  """
  flat = chosen.reshape(-1)
  assignments = jnp.argsort(flat, stable=True).astype(jnp.int32)
  index = jnp.arange(flat.size, dtype=jnp.int32)
  positions = jnp.zeros(flat.size, jnp.int32).at[assignments].set(index)
  sizes = jnp.zeros(experts, jnp.int32).at[flat].add(1, mode='drop')
  order = Order(assignments, positions, sizes, jnp.cumsum(sizes) - sizes)
  return Order(*(checkpoint_name(x, SAVED[0]) for x in order))


@jax.custom_vjp
def permute(x: Float[Array, 'M D'], layout: Layout) -> Float[Array, 'R D']:
  """Returns the vector of each row's token. Padding gets any token's."""
  return x[layout.assignments // (layout.rows.size // x.shape[0])]


def _permute_backward(residuals, g):
  layout, tokens = residuals
  return _sum_by_token(g, layout, tokens).astype(g.dtype), None


permute.defvjp(
  lambda x, layout: (permute(x, layout), (layout, x.shape[0])),
  _permute_backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def unpermute(
  rows: Float[Array, 'R D'], layout: Layout, k: int
) -> Float[Array, 'M D']:
  """Returns the sum of each token's `k` rows, float32: `permute` transposed."""
  return _sum_by_token(rows, layout, layout.rows.size // k)


def _unpermute_forward(rows, layout, k):
  like = jnp.zeros((0,), rows.dtype)
  return unpermute(rows, layout, k), (layout, like)


def _unpermute_backward(k, residuals, g):
  layout, like = residuals
  d_rows = jnp.where(layout.valid[:, None], g[layout.assignments // k], 0)
  return d_rows.astype(like.dtype), None


unpermute.defvjp(_unpermute_forward, _unpermute_backward)


@functools.partial(jax.checkpoint, prevent_cse=False)
def weigh(
  hidden: Float[Array, 'R F'], gates: Float[Array, 'M K'], layout: Layout
) -> Float[Array, 'R F']:
  """Returns each row times its gate, for the down product.

  That product is linear. Behind it, the gates' gradient would read its result,
  and the backward pass would have to compute that again.
  """
  row_gates = permute(gates.reshape(-1, 1), layout)
  return (hidden.astype(jnp.float32) * row_gates).astype(hidden.dtype)


def _sum_by_token(rows, layout: Layout, tokens: int):
  """Returns the sum of a token's rows, added one choice at a time.

  The K rows of all tokens at once would be the largest array of a step.
  """
  choices = [x.reshape(tokens, -1).T for x in (layout.rows, layout.present)]
  # A select, not a product with 0: padding may hold inf or NaN.
  return sum(
    jnp.where(present[:, None], rows[index], 0).astype(jnp.float32)
    for index, present in zip(*choices, strict=True)
  )
