"""Rows of tokens to their experts and back, by gathers alone.

An assignment is one token's place with one of its K experts, token * K + k.
Sorted by expert, assignments are the rows of grouped products. Going there and
coming back are both gathers, and so are their gradients, because the order is
known in both directions: no scatter-add, which accelerators are slow at.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mla_moe.types import Array, Float, Int

# Kept for the backward pass under every policy: sorting again costs more than
# a few numbers a token.
SAVED = ('dispatch',)


def room(expected: int, multiple: int) -> int:
  """Places for as many rows and half as many again, a whole multiple.

  What finds none takes a slower way; nothing is dropped.
  """
  return -(-3 * expected // (2 * multiple)) * multiple


class Order(NamedTuple):
  """Assignments sorted by expert, and the way back."""

  slots: Array  # [A] which assignment stands at each sorted place
  places: Array  # [A] where each assignment stands
  sizes: Array  # [E] rows of each expert
  starts: Array  # [E] its first place


def sort(chosen: Int[Array, 'M K'], experts: int) -> Order:
  """Assignments with the id `experts` belong to none here: they come last."""
  flat = chosen.reshape(-1)
  slots = jnp.argsort(flat, stable=True).astype(jnp.int32)
  every = jnp.arange(flat.size, dtype=jnp.int32)
  places = jnp.zeros(flat.size, jnp.int32).at[slots].set(every)
  sizes = jnp.zeros(experts, jnp.int32).at[flat].add(1, mode='drop')
  order = Order(slots, places, sizes, jnp.cumsum(sizes) - sizes)
  return Order(*(checkpoint_name(x, SAVED[0]) for x in order))


@jax.custom_vjp
def spread(
  x: Float[Array, 'M D'],
  slots: Int[Array, ' R'],
  places: Int[Array, ' A'],
  held: Array,
) -> Float[Array, 'R D']:
  """The rows of assignments `slots`; `places` is the way back where `held`."""
  return x[slots // (places.size // x.shape[0])]


def _spread_backward(residuals, g):
  places, held, m = residuals
  return _total(g, places, held, m).astype(g.dtype), None, None, None


spread.defvjp(
  lambda x, slots, places, held: (
    spread(x, slots, places, held),
    (places, held, x.shape[0]),
  ),
  _spread_backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def collect(
  rows: Float[Array, 'R D'],
  slots: Int[Array, ' R'],
  valid: Array,
  places: Int[Array, ' A'],
  held: Array,
  k: int,
) -> Float[Array, 'M D']:
  """Each token's K rows summed, float32, where `held`: `spread` turned round.

  `valid` says which of the rows are anybody's.
  """
  return _total(rows, places, held, places.size // k)


def _collect_forward(rows, slots, valid, places, held, k):
  like = jnp.zeros((0,), rows.dtype)
  return collect(rows, slots, valid, places, held, k), (slots, valid, like)


def _collect_backward(k, residuals, g):
  slots, valid, like = residuals
  drows = jnp.where(valid[:, None], g[slots // k], 0).astype(like.dtype)
  return drows, None, None, None, None


collect.defvjp(_collect_forward, _collect_backward)


@jax.custom_vjp
def combine(
  rows: Float[Array, 'R D'],
  weights: Float[Array, 'M K'],
  slots: Int[Array, ' R'],
  valid: Array,
  places: Int[Array, ' A'],
  held: Array,
) -> Float[Array, 'M D']:
  """Each token's rows summed by weight, float32; those not `held` are left out.

  `valid` says which of the rows are anybody's.
  """
  ways = zip(*_by_choice(places, held, len(weights)), weights.T, strict=True)
  return sum(_picked(rows, *way) * share[:, None] for *way, share in ways)


def _by_choice(places, held, tokens):
  """Places and whether they are held, of all tokens' k-th choices: [K, M].

  Summed choice by choice, tokens never have K rows each at the same time:
  those would be the largest array of a training step.
  """
  return places.reshape(tokens, -1).T, held.reshape(tokens, -1).T


def _total(rows, places, held, tokens):
  ways = zip(*_by_choice(places, held, tokens), strict=True)
  return sum(_picked(rows, *way) for way in ways)


def _picked(rows, places, held):
  # Select, never multiply: rows that nobody reads may hold anything.
  return jnp.where(held[:, None], rows[places], 0).astype(jnp.float32)


def _combine_backward(residuals, g):
  rows, weights, slots, valid, places, held = residuals
  share = jnp.where(valid, weights.reshape(-1)[slots], 0)
  drows = (g[slots // weights.shape[1]] * share[:, None]).astype(rows.dtype)
  ways = zip(*_by_choice(places, held, len(weights)), strict=True)
  dshare = [(_picked(rows, *way) * g).sum(-1) for way in ways]
  return drows, jnp.stack(dshare, axis=1), None, None, None, None


combine.defvjp(lambda *args: (combine(*args), args), _combine_backward)
