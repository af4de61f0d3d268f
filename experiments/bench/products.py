"""The rate at which a model's products run alone: the bound of its step.

Every product of the model, at its own size and in the three forms of training
(forward, and the gradients of both operands), is timed by itself. Weighed by
the FLOPs that a step has of each, they give one rate for the whole model.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from . import models


class Product(NamedTuple):
  """`times` products [batch, rows, inner] x [batch, inner, columns] forward.

  `useful` is the fraction that counts as work: half of causal attention.
  """

  name: str
  times: int
  batch: int
  rows: int
  inner: int
  columns: int
  useful: float = 1.0

  @property
  def flops(self) -> float:
    """FLOPs of one forward product; a training step has three times as many."""
    return 2.0 * self.batch * self.rows * self.inner * self.columns


def of(s: models.Shape) -> list[Product]:
  """Returns the products of a training step at a shape."""
  rows, n, moe = s.batch * s.length, s.layers, s.layers - s.dense_layers
  head = s.nope_dim + s.rope_dim
  heads = s.batch * s.heads, s.length
  routed = rows * s.top_k // s.experts  # rows of one expert, balanced
  return [
    Product('query down', n, 1, rows, s.dim, s.query_rank),
    Product('query up', n, 1, rows, s.query_rank, s.heads * head),
    Product('latent', n, 1, rows, s.dim, s.kv_rank + s.rope_dim),
    Product('key up', n, 1, rows, s.kv_rank, s.heads * s.nope_dim),
    Product('value up', n, 1, rows, s.kv_rank, s.heads * s.value_dim),
    Product('output', n, 1, rows, s.heads * s.value_dim, s.dim),
    Product('logits', n, *heads, head, s.length, 0.5),
    Product('values', n, *heads, s.length, s.value_dim, 0.5),
    Product('dense up', s.dense_layers, 1, rows, s.dim, 2 * s.dense_width),
    Product('dense down', s.dense_layers, 1, rows, s.dense_width, s.dim),
    Product('shared up', moe, 1, rows, s.dim, 2 * s.shared * s.width),
    Product('shared down', moe, 1, rows, s.shared * s.width, s.dim),
    Product('experts up', moe, s.experts, routed, s.dim, 2 * s.width),
    Product('experts down', moe, s.experts, routed, s.width, s.dim),
    Product('router', moe, 1, rows, s.dim, s.experts),
    Product('head', 1, 1, rows, s.dim, s.vocab),
  ]


def rates(s: models.Shape, tries: int = 5) -> list[tuple[Product, float]]:
  """Returns FLOP/s of each product over its three forms, median of `tries`."""
  import jax
  import jax.numpy as jnp

  forms = [
    lambda x, w, g: x @ w,
    lambda x, w, g: g @ w.T,
    lambda x, w, g: x.T @ g,
  ]

  def seconds(p: Product, form) -> float:
    # The matrices of a batch one by one: XLA's CPU backend does not share one
    # batched product of small matrices among cores.
    run = jax.jit(lambda *args: jax.lax.map(lambda one: form(*one), args))
    make = lambda *size: jnp.ones((p.batch, *size), jnp.float32)
    args = make(p.rows, p.inner), make(p.inner, p.columns)
    args = *args, make(p.rows, p.columns)
    times = []
    for _ in range(tries + 1):
      began = time.perf_counter()
      run(*args).block_until_ready()
      times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))

  return [
    (p, 3 * p.flops / sum(seconds(p, form) for form in forms)) for p in of(s)
  ]


def together(measured: list[tuple[Product, float]]) -> float:
  """Returns one rate: a step's useful FLOPs over their time, run alone."""
  useful = [3 * p.times * p.useful * p.flops for p, _ in measured]
  rates = [rate for _, rate in measured]
  alone = [work / rate for work, rate in zip(useful, rates, strict=True)]
  return sum(useful) / sum(alone)
