"""docs/library.md runs; the library's seams reach every layer."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
import runpy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import tiny
from experiments.checkpointing import load, saving
from mla_moe import Functions, Transformer, fp8, init_state, sharding
from mla_moe.config import ConfigError, MeshConfig, freeze
from mla_moe.model import attention, router, trace

ROOT = pathlib.Path(__file__).parent.parent
MICRO = freeze(tiny.get_config('micro'))
PAGE = (ROOT / 'docs' / 'library.md').read_text()


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  """The names that the blocks of the page define, run as one program."""
  folder = tmp_path_factory.mktemp('library')
  run = folder / 'runs' / 'tiny'
  run.mkdir(parents=True)
  (run / 'config.json').write_text(json.dumps(dataclasses.asdict(MICRO)))
  zeros = lambda x: jnp.zeros(x.shape, x.dtype)
  state = jax.tree.map(zeros, load.shapes(MICRO))
  with saving.Writer(run / 'checkpoints', keep=1) as writer:
    writer.save(3, state, {})
  blocks = re.findall(r'```python\n(.*?)```', PAGE, re.S)
  assert len(blocks) >= 9
  (folder / 'page.py').write_text('\n\n'.join(blocks))
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    names = runpy.run_path('page.py')
  return names | {'stored': state}


@pytest.mark.slow
def test_the_page_runs(page):
  assert page['same'] == dataclasses.replace(
    page['model'], compute=page['same'].compute
  )
  assert page['run'] == MICRO
  chex.assert_trees_all_equal(page['trained']['params'], page['stored'].params)
  chex.assert_trees_all_equal(page['trained']['router'], page['stored'].router)


def altered_attend(*args, **keywords):
  return attention.attend(*args, **keywords | {'impl': 'reference'})


def altered_route(x, w_router, bias, moe):
  return router.route(x, w_router, bias, dataclasses.replace(moe, scale=9.0))


def program(config, functions, variables):
  """The jaxpr of a model's hidden states, as text."""
  network = Transformer(config, functions)
  run = functools.partial(network.apply, method=network.features)
  return str(jax.make_jaxpr(run)(variables, jnp.zeros((2, 8), jnp.int32)))


@pytest.mark.parametrize('stages', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_functions_reach_every_layer(stages):
  """Dense, MoE, MTP, pipeline: as a config's field that means the same does."""
  model = dataclasses.replace(
    MICRO.model, layers=3, mtp=dataclasses.replace(MICRO.model.mtp, depth=1)
  )
  fields = dataclasses.replace(
    model,
    compute=dataclasses.replace(model.compute, attention='reference'),
    moe=dataclasses.replace(model.moe, scale=9.0),
  )
  state = load.shapes(dataclasses.replace(MICRO, model=model))
  variables = {'params': state.params, 'router': state.router}
  mesh = sharding.make_mesh(MeshConfig(stage=2), jax.devices()[:2])
  with jax.set_mesh(mesh) if stages == 2 else contextlib.nullcontext():
    own = Functions(altered_attend, altered_route)
    got = program(model, own, variables)
    assert got == program(fields, Functions(), variables)


def test_the_trace_is_of_the_model():
  """Logits and load are the model's, in each layer, with packed documents."""
  model = MICRO.model
  tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 256)
  segments = jnp.repeat(jnp.arange(2, dtype=jnp.int32), 8)[None]
  segments = jnp.broadcast_to(segments, (2, 16))
  network = Transformer(model)

  @jax.jit
  def both(key):
    variables = nn.unbox(network.init(key, tokens))
    out = network.apply(variables, tokens, None, segments)
    return out, trace.trace(model, variables, tokens, None, segments)

  out, seen = both(jax.random.key(0))
  chex.assert_trees_all_close(seen.logits, out.logits, atol=1e-5)
  count = lambda ids: np.bincount(np.ravel(ids), minlength=model.moe.experts)
  np.testing.assert_array_equal(
    [count(ids) for ids in np.asarray(seen.chosen)], out.expert_load
  )
  assert seen.entropy.shape == (2, 2, 16, 2)
  first = np.asarray(seen.entropy).reshape(2, 2, 2, 8, 2)
  assert (np.abs(first[:, :, :, 0]) < 1e-6).all()  # one key is no choice
  assert (first <= np.log(np.arange(1, 9))[:, None] + 1e-5).all()
  assert first[:, :, :, 1:].min() > 0


def test_equal_scores_have_the_largest_entropy():
  q = jnp.zeros((1, 6, 2, 4))
  k = jax.random.normal(jax.random.key(0), q.shape)
  got = np.asarray(trace.entropy(q, k, 1.0))
  expected = [[math.log(i + 1)] * 2 for i in range(6)]
  np.testing.assert_allclose(got[0], expected, atol=1e-6)


def test_a_trace_takes_no_mesh():
  mesh = sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])
  tokens = jnp.zeros((2, 16), jnp.int32)
  with jax.set_mesh(mesh), pytest.raises(ConfigError, match='one device'):
    trace.trace(MICRO.model, {'params': {}}, tokens)


@pytest.mark.parametrize('kind', ['names', 'types'])
def test_a_mesh_of_other_axes_is_refused_in_one_line(kind):
  names, sizes = ('rows', 'columns'), (2, 1)
  if kind == 'types':  # jax's default is Explicit
    names, sizes = sharding.AXES, (2, 1, 1, 1, 1, 1)
  mesh = jax.make_mesh(
    sizes,
    names,
    devices=jax.devices()[:2],
    axis_types=(jax.sharding.AxisType.Explicit,) * len(names),
  )
  network = Transformer(MICRO.model)
  tokens = jnp.zeros((2, 16), jnp.int32)
  with jax.set_mesh(mesh), pytest.raises(ConfigError) as refused:
    jax.eval_shape(network.init, jax.random.key(0), tokens)
  line = str(refused.value)
  assert names[0] in line and 'sharding.make_mesh' in line
  assert len(line.splitlines()) == 1


@pytest.mark.parametrize('words', [('fp8_blok',), ('fp8_block', 'native')])
def test_an_unknown_precision_is_refused_where_it_is_written(words):
  with pytest.raises(ConfigError, match='must be one of|needs one of'):
    fp8.DotGeneral(*words)


@pytest.mark.slow
def test_an_objective_is_the_same_in_any_micro_batches(page):
  """The host's denominators and weights come along with the rows."""
  two = page['episodes']
  join = lambda x: np.asarray(x).reshape(1, 4, *x.shape[2:]) if x.ndim else x
  one = jax.tree.map(join, two)._replace(count=np.int32(1))
  assert two.count == 2 and two.old.shape == (2, 2, 16)
  start = init_state(jax.random.key(3), page['config'])
  results = [
    page['train'](
      start,
      batch,
      page['rates'],
      config=page['config'],
      objective=page['policy_gradient'],
      functions=page['own'],
    )
    for batch in (one, two)
  ]
  (a, m), (b, n) = results
  chex.assert_trees_all_close(m, n, rtol=1e-4, atol=1e-6)
  chex.assert_trees_all_close(a.params, b.params, atol=1e-5)
  assert float(m['clipped']) > 0
