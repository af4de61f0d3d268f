"""Routes of another pass are replayed once; those of its own change nothing."""

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import r1_tiny
from experiments.rl import objective
from mla_moe import sharding
from mla_moe.config import MeshConfig, freeze
from mla_moe.model import replay, router, trace
from mla_moe.train import step
from mla_moe.train.state import init_state

B, T = 2, 8
CONFIG = freeze(r1_tiny.get_config('smoke'))
# Two MoE layers, with biases, in groups of which half are allowed.
MOE = dataclasses.replace(
  CONFIG.model.moe, experts=8, top_k=2, groups=4, top_groups=2
)
MODEL = dataclasses.replace(
  CONFIG.model, dim=16, layers=2, dense_layers=0, moe=MOE
)
CONFIG = dataclasses.replace(
  CONFIG,
  model=MODEL,
  rl=dataclasses.replace(CONFIG.rl, temperature=1.0, replay='rollout'),
)
L, K = MODEL.moe_layers, MOE.top_k


class Micro(NamedTuple):
  """A micro-batch with a record."""

  tokens: jax.Array
  targets: jax.Array
  segments: jax.Array
  positions: jax.Array
  routes: jax.Array | None


@functools.cache
def variables():
  state = init_state(jax.random.key(0), CONFIG)
  biases = jax.tree.map(
    lambda x: 0.1 * jax.random.normal(jax.random.key(1), x.shape), state.router
  )
  return state.params, biases


def micro(routes, rows=B):
  tokens = jax.random.randint(jax.random.key(2), (rows, T), 0, 256)
  positions = jnp.tile(jnp.arange(T, dtype=jnp.int32), (rows, 1))
  zeros = jnp.zeros_like(positions)
  return Micro(tokens, jnp.roll(tokens, -1, 1), zeros, positions, routes)


@functools.partial(jax.jit, static_argnames=('config', 'rows'))
def _run(params, biases, routes, config, rows):
  return step.predictions(params, biases, micro(routes, rows), config)


def run(routes, config=CONFIG, rows=B):
  return _run(*variables(), routes, config, rows)


@functools.partial(jax.jit, static_argnames=('config', 'rows'))
def _grads(params, biases, routes, config, rows):
  loss = lambda p: _run(p, biases, routes, config, rows).nll.sum()
  return jax.grad(loss)(params)


def grads(routes, config=CONFIG, rows=B):
  return _grads(*variables(), routes, config, rows)


def natural(rows=B):
  return jnp.full((rows, T, L, K), -1, jnp.int16)


def test_a_replay_of_its_own_routes_changes_nothing():
  plain, free = run(None), run(natural())
  assert plain.routes is None
  again = run(free.routes)
  for out in (free, again):
    chex.assert_trees_all_equal((out.nll, out.stats), (plain.nll, plain.stats))
  chex.assert_trees_all_equal(again.routes, free.routes)


@pytest.mark.slow
def test_a_replay_of_its_own_routes_has_the_same_gradient():
  """And its record is that of `trace`."""
  routes, want = run(natural()).routes, grads(None)
  chex.assert_trees_all_equal(grads(natural()), want)
  chex.assert_trees_all_equal(grads(routes), want)
  params, biases = variables()
  given = {'params': params, 'router': biases}
  noted = trace.trace(MODEL, given, micro(None).tokens).chosen
  chex.assert_trees_all_equal(
    jnp.moveaxis(noted, 0, 2).astype(jnp.int16), routes
  )


def some_routes(rows):
  """Any two experts, of groups that the router would not allow, too."""
  rng = np.random.default_rng(0)
  order = np.argsort(rng.random((rows, T, L, MOE.experts)), axis=-1)
  return jnp.asarray(order[..., :K], jnp.int16).at[0, 3].set(-1)


def test_each_recorded_route_is_taken_once():
  routes = some_routes(B)
  out, free = run(routes), run(natural())
  taken = np.where(np.asarray(routes) < 0, out.routes, routes)
  for layer in range(L):
    want = np.bincount(taken[:, :, layer].reshape(-1), minlength=MOE.experts)
    np.testing.assert_array_equal(out.stats.load[layer], want)
  # The first layer's routers choose as ever, and token 3 does as they say.
  chex.assert_trees_all_equal(out.routes[:, :, 0], free.routes[:, :, 0])
  differ = objective.flips(jnp.asarray(taken), out.routes)
  assert not differ[0, 3].any() and differ.mean() > 0.5


def test_a_comparison_replays_nothing():
  assert replay.by_layer(None, 'rollout') is None
  routes = jnp.zeros((B, T, L, K), jnp.int16)
  for mode, value in (('compare', -1), ('train', 0), ('rollout', 0)):
    chosen = replay.by_layer(routes, mode)
    chex.assert_shape(chosen, (L, B, T, K))
    assert (chosen == value).all()


def test_gates_of_a_router_of_ones_own_stay_where_nothing_is_replayed():
  """A record of -1 compares: it must not change the model's function."""
  scores = jax.nn.sigmoid(jax.random.normal(jax.random.key(4), (3, 8)))
  chosen = router.select(scores, jnp.zeros(8), MOE)
  own = router.Routing(jnp.full((3, K), 0.25), chosen, scores)
  routes = jnp.array([[-1, -1], [5, 6], [-1, -1]], jnp.int32)
  out = router.replay(own, routes, MOE)
  chex.assert_trees_all_equal(out.gates[::2], own.gates[::2])
  chex.assert_trees_all_equal(out.chosen[::2], own.chosen[::2])
  np.testing.assert_array_equal(out.chosen[1], [5, 6])
  want = MOE.scale * scores[1, 5:7] / scores[1, 5:7].sum()
  chex.assert_trees_all_close(out.gates[1], want, rtol=1e-6)


def test_flips_are_of_sets():
  one = jnp.array([[1, 2], [1, 2], [1, 2], [-1, -1]])
  two = jnp.array([[2, 1], [2, 3], [-1, -1], [0, 1]])
  np.testing.assert_array_equal(objective.flips(one, two), [0, 1, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize(
  'axes', [dict(data=2, expert=4), dict(expert=2, context=2, tensor=2)]
)
def test_eight_devices_replay_as_one(axes):
  rows = 8
  routes = some_routes(rows)
  one, want = run(routes, rows=rows), grads(routes, rows=rows)
  # Gates are of the pass's own scores, and have their gradients.
  moved = jnp.abs(want['moe']['ffn']['w_router']).max(1) > 0
  chex.assert_trees_all_equal(moved, one.stats.load > 0)
  config = dataclasses.replace(CONFIG, mesh=MeshConfig(**axes))
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    eight = run(routes, config, rows)
    other = grads(routes, config, rows)
  chex.assert_trees_all_equal(one.stats.load, eight.stats.load)
  chex.assert_trees_all_equal(one.routes, eight.routes)
  chex.assert_trees_all_close(want, other, rtol=1e-4, atol=1e-5)
