"""Frozen bases and adapters against the dense model of the same numbers."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import types

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import shallow
from flax import linen as nn

from configs import lora as lora_recipes
from configs import tiny
from experiments import convert, train, workdir
from experiments.adapters import base as frozen_base
from experiments.adapters import codes, lora, peft_files
from experiments.adapters.frozen import Frozen
from experiments.adapters.load import load_base
from experiments.checkpointing import load, store
from experiments.training import program, warm_start
from mla_moe import (
  Transformer,
  load_huggingface,
  rollout,
  save_huggingface,
  sharding,
)
from mla_moe.config import (
  Config,
  ConfigError,
  LoRAConfig,
  MeshConfig,
  MTPConfig,
  RLConfig,
  freeze,
  thaw,
)
from mla_moe.decode import forward
from mla_moe.hf import formats, fp8_blocks, safetensors

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
is_frozen = lambda w: isinstance(w, Frozen)


@functools.cache
def released(name, base='trained'):
  return load_base(GOLDEN / name, base)


@jax.jit
def dense(params, like):
  """Floats in the place of all frozen weights."""
  one = lambda w, x: w.astype(jnp.float32).reshape(x.shape)
  pick = lambda w, x: one(w, x) if is_frozen(w) else w
  return jax.tree.map(pick, params, like, is_leaf=is_frozen)


def random_weights(model, seed=0):
  """Boxed shapes of a fresh model, with normal numbers; norms stay ones."""
  random = np.random.default_rng(seed)

  def draw(path, like):
    if path[-1].key == 'scale':
      return np.ones(like.shape, np.float32)
    return random.normal(0, 0.04, like.shape).astype(np.float32)

  shapes = jax.eval_shape(Transformer(model).init, jax.random.key(0), TOKENS)
  return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))


def random_adapters(model, key=0):
  fresh = nn.unbox(lora.boxed(jax.random.key(key), model))
  noise = lambda x: 0.05 * jax.random.normal(jax.random.key(x.size), x.shape)
  return jax.tree.map(lambda x: x + noise(x), fresh)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, variables):
  return Transformer(model).apply(variables, TOKENS).logits


def test_released_blocks_are_kept():
  """FP8 blocks are read without a change, bytes and numbers."""
  model, whole = released('v3_release')
  _, frozen = released('v3_release', 'fp8')
  assert len(list(filter(is_frozen, leaves(frozen)))) > 20
  chex.assert_trees_all_equal(
    dense(frozen['params'], whole['params']), whole['params']
  )


def leaves(tree):
  return jax.tree.leaves(tree, is_leaf=is_frozen)


@pytest.mark.parametrize(
  'kind, bound', [('fp8', 1 / 16), ('int8', 1 / 254), ('int4', 1 / 14)]
)
def test_quantised_numbers(kind, bound):
  """Errors of a rounding: half of a step of the group's largest number."""
  w = np.random.default_rng(0).normal(size=(5, 200)).astype(np.float32)
  w[2, :40] = 0
  values, scales = codes.quantize(w, kind)
  group = codes.GROUPS[kind]
  w_frozen = Frozen(
    jnp.array(values.T), jnp.array(scales.T), None, None, kind, (5,)
  )
  got = np.asarray(w_frozen.astype(jnp.float32)).T
  tops = (
    np.abs(np.pad(w, [(0, 0), (0, -200 % group)])).reshape(5, -1, group).max(2)
  )
  tops = np.repeat(tops, group, 1)[:, :200]
  # int4's scales are bfloat16, whose rounding adds 1/256 of 7 steps.
  assert (np.abs(got - w) <= tops * bound * 1.07).all()


@pytest.mark.parametrize(
  'base, bits, group, packed',
  [
    ('int8', 8, 256, False),
    ('int8', 8, 128, True),
    ('int4', 4, 32, True),
    ('int4', 4, 128, True),
  ],
)
def test_integers_are_those_of_the_file(base, bits, group, packed):
  """Bytes of some rows, and scales, repeated for each group of the base."""
  random, low = np.random.default_rng(0), -(2 ** (bits - 1))
  q = random.integers(low, -low, (6, 256))
  scale = random.uniform(0.01, 0.1, (6, 256 // group))
  scale = scale.astype(ml_dtypes.bfloat16)
  tensors = {'x.weight': q.astype(np.int8), 'x.weight_scale': scale}
  if packed:  # compressed-tensors: low first, around the middle
    words = (q - low).reshape(6, -1, 32 // bits).astype(np.uint32)
    words <<= np.uint32(bits) * np.arange(32 // bits, dtype=np.uint32)
    del tensors['x.weight']
    tensors['x.weight_packed'] = words.sum(-1, dtype=np.uint32).view(np.int32)
  entry = lambda n: safetensors.Entry(tensors[n].dtype, tensors[n].shape, 0, 0)
  tiles = ((1, group),)
  stored = formats.find('x.weight', (6, 256), tensors, entry, tiles)
  part = slice(1, 5), slice(None)
  got, scales = codes.read(stored, part, tensors.__getitem__, base)
  raw = np.ascontiguousarray(tensors[stored.codes][1:5]).view(np.uint8)
  raw = raw ^ 0x80 if packed and bits == 8 else raw  # without the sign
  np.testing.assert_array_equal(got.view(np.uint8), raw)
  wide = scale[1:5].astype(np.float32).repeat(group // codes.GROUPS[base], 1)
  np.testing.assert_array_equal(scales.astype(np.float32), wide)
  w = Frozen(jnp.array(got.T), jnp.array(scales.T), None, None, base, (4,))
  want = q[1:5] * scale[1:5].astype(np.float32).repeat(group, 1)
  np.testing.assert_array_equal(w.astype(jnp.float32), want.T)


def test_all_fp8_numbers():
  """Each of E4M3's numbers, subnormal ones and both signs."""
  bits = np.arange(256, dtype=np.uint8)
  bits = bits[(bits & 127) != 127][:, None]
  w = Frozen(jnp.array(bits), jnp.ones((2, 1)), None, None, 'fp8', (1,))
  np.testing.assert_array_equal(w.astype(jnp.float32), fp8_blocks.VALUES[bits])


@functools.partial(jax.jit, static_argnums=(1, 2))
def gradients(own, model, floats, frozen, like, tokens=TOKENS):
  """Logits, and the gradients of adapters, over codes or over floats."""

  def loss(own):
    params = lora.join(frozen['params'], own, model)
    params = dense(params, like) if floats else params
    out = Transformer(model).apply(frozen | {'params': params}, tokens)
    return jnp.square(out.logits).mean(), out.logits

  (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(own)
  return logits, grads


@pytest.mark.slow
@pytest.mark.parametrize(
  'folder, base, experts, form',
  [
    ('v2_lite', 'int4', 'each', 'loop'),
    ('v3_yarn', 'int8', 'shared', 'loop'),
    ('v2_lite', 'fp8', 'each', 'ragged'),
  ],
)
def test_equals_the_dense_model(folder, base, experts, form):
  """Logits and the adapters' gradients; zero adapters are the base."""
  like = released(folder)[1]['params']
  model, frozen = released(folder, base)
  compute = dataclasses.replace(model.compute, experts=form)
  own = LoRAConfig(rank=2, experts=experts)
  model = dataclasses.replace(model, lora=own, compute=compute)
  adapters = random_adapters(model)
  got, got_grads = gradients(adapters, model, False, frozen, like)
  want, want_grads = gradients(adapters, model, True, frozen, like)
  np.testing.assert_allclose(got, want, atol=2e-4)
  assert min(jnp.abs(x).max() for x in leaves(want_grads)) > 0

  def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()))

  jax.tree.map(close, got_grads, want_grads)
  zero = jax.tree.map(jnp.zeros_like, adapters)
  alone, _ = gradients(zero, model, False, frozen, like)
  zero = jax.tree_util.tree_map_with_path(
    lambda path, x: x if path[-1].key == 'a' else 0 * x, adapters
  )
  fresh, _ = gradients(zero, model, False, frozen, like)
  np.testing.assert_array_equal(fresh, alone)
  if experts == 'shared':  # one program of the base alone is enough
    base_alone = logits(dataclasses.replace(model, lora=LoRAConfig()), frozen)
    np.testing.assert_allclose(fresh, base_alone, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['loop', 'ragged'])
def test_gradients_are_those_of_float64(form):
  """Of one expert layer over int4, by x, gates and all adapters."""
  model, frozen = released('v2_lite', 'int4')
  model = dataclasses.replace(model, lora=LoRAConfig(rank=2))
  params = lora.join(frozen['params'], random_adapters(model), model)
  ws = [params['moe']['ffn'][x][jnp.int32(0)] for x in ('w_gate_up', 'w_down')]
  random, moe = np.random.default_rng(0), model.moe
  x = random.normal(size=(24, model.dim)).astype(np.float32)
  chosen = np.argsort(random.normal(size=(24, moe.experts)))[:, : moe.top_k]
  gates = random.uniform(0.1, 1, chosen.shape).astype(np.float32)
  push = random.normal(size=x.shape).astype(np.float32)

  def ours(x, gates, pairs):
    w_gate_up, w_down = map(Frozen.with_trained, ws, pairs)
    args = x, gates, chosen, w_gate_up, form, chosen.size
    return (w_down.feed_forward(*args) * push).sum()

  def dense(x, gates, pairs):
    wide = []
    for w, (a, b) in zip(floats, pairs, strict=True):
      wide.append(w + (a @ b.reshape(*b.shape[:2], -1)).reshape(w.shape))
    gate, up = jnp.moveaxis(jnp.einsum('md,edcf->mecf', x, wide[0]), 2, 0)
    each = jnp.einsum('mef,efd->med', gate / (1 + jnp.exp(-gate)) * up, wide[1])
    rows = jnp.take_along_axis(each, chosen[..., None], 1)
    return ((rows * gates[..., None]).sum(1) * push).sum()

  args = x, gates, [w.trained for w in ws]
  got = jax.jit(jax.grad(ours, (0, 1, 2)))(*args)
  floats = [np.float64(w.floats(jnp.float32)) for w in ws]
  with jax.enable_x64(True):
    want = jax.grad(dense, (0, 1, 2))(*jax.tree.map(np.float64, args))

  def close(a, b):
    assert b.dtype == np.float64
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())

  jax.tree.map(close, got, jax.device_get(want))


@pytest.mark.slow
def test_the_floats_of_a_base_are_no_residuals():
  """Of grouped products, even where a layer keeps all for its backward pass."""
  model, frozen = released('v2_lite', 'int8')
  compute = dataclasses.replace(model.compute, experts='ragged', remat='none')
  own = LoRAConfig(rank=2)
  model = dataclasses.replace(model, lora=own, compute=compute)

  def run(adapters):
    params = lora.join(frozen['params'], adapters, model)
    return Transformer(model).apply(frozen | {'params': params}, TOKENS).logits

  kept = jax.eval_shape(lambda x: jax.vjp(run, x)[1], random_adapters(model))
  sizes = [x.size for x in leaves(kept) if x.dtype.itemsize > 1]
  moe = model.moe
  assert max(sizes) < moe.experts * model.dim * moe.width


@pytest.mark.slow
def test_decoding():
  """Codes of experts are read in place, adapters beside them.

  A row takes its experts one by one, twelve rows take the loop over all.
  """
  plain, whole = released('v2_lite')
  model, frozen = released('v2_lite', 'int4')
  plain = dataclasses.replace(plain, layers=2)
  model = dataclasses.replace(model, layers=2, lora=LoRAConfig(rank=2))
  whole, frozen = shallow.cut(whole), shallow.cut(frozen)
  params = lora.join(frozen['params'], random_adapters(model), model)
  floats = frozen | {'params': dense(params, whole['params'])}
  weights = forward.layer_weights(model, frozen | {'params': params})
  same = weights['layers'][-1]['ffn'], params['moe']['ffn']
  one, other = (ffn['w_down'].codes.unsafe_buffer_pointer() for ffn in same)
  assert one == other  # a copy for each layer is the model's size squared
  prompt = np.tile(np.asarray(TOKENS[:1]), (12, 1))
  theirs = rollout(plain, floats, prompt, 4)
  for rows in (1, 12):
    ours = rollout(model, frozen | {'params': params}, prompt[:rows], 4)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens[:rows])
    np.testing.assert_allclose(
      ours.log_probs, theirs.log_probs[:rows], atol=2e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize('base', ['int4', 'trained'])
def test_a_mesh_gives_the_numbers_of_one_device(base, tmp_path):
  """Logits, adapters' gradients and decoding; each device has an eighth."""
  plain = freeze(tiny.get_config('smoke')).model
  moe = dataclasses.replace(plain.moe, width=64)  # whole groups on a device
  plain = dataclasses.replace(
    plain, precision='bf16', moe=moe, layers=2, mtp=MTPConfig(0)
  )
  save_huggingface(tmp_path / 'base', plain, random_weights(plain))
  tokens = jnp.concatenate([TOKENS, TOKENS + 1])

  def numbers(mesh):
    model, frozen = load_base(tmp_path / 'base', base, mesh=mesh)
    model = dataclasses.replace(model, lora=LoRAConfig(rank=2))
    own = random_adapters(model)
    if mesh is None:
      return compute(model, own, frozen)
    boxed = jax.eval_shape(
      functools.partial(lora.boxed, model=model), jax.random.key(0)
    )
    own = jax.device_put(own, sharding.shardings(boxed, mesh))
    w = frozen['params']['moe']['ffn']['w_down']
    w = w.codes if is_frozen(w) else w
    assert 8 * w.addressable_shards[0].data.size == w.size
    with jax.set_mesh(mesh):
      joined = {'params': lora.join(frozen['params'], own, model)}
      weights = forward.layer_weights(model, frozen | joined)
      # A layer's alone: a region would gather those of all.
      assert weights['layers'][-1]['ffn']['w_down'].codes.ndim == 3
      return compute(model, own, frozen)

  def compute(model, own, frozen):
    out = gradients(own, model, False, frozen, None, tokens)
    joined = {'params': lora.join(frozen['params'], own, model)}
    answer = rollout(
      model, frozen | joined, np.asarray(tokens), 4, temperature=0.0
    )
    return jax.device_get((*out, answer.tokens, answer.log_probs))

  mesh = sharding.make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
  alone, together = numbers(None), numbers(mesh)
  np.testing.assert_allclose(together[0], alone[0], atol=1e-4)
  close = lambda a, b: np.testing.assert_allclose(
    a, b, atol=1e-4 * np.abs(b).max()
  )
  jax.tree.map(close, together[1], alone[1])
  assert min(np.abs(x).max() for x in leaves(alone[1])) > 0
  np.testing.assert_array_equal(together[2], alone[2])
  np.testing.assert_allclose(together[3], alone[3], atol=1e-4)


def test_peft(tmp_path):
  """PEFT's own file: its logits, and the same tensors when written again."""
  plain, whole = released('v3_yarn')
  plain = dataclasses.replace(plain, lora=LoRAConfig(plus=4.0))
  model, own, name = peft_files.load(GOLDEN / 'peft', plain)
  assert model.lora.plus == 4.0  # which changes neither logits nor file
  assert name == 'v3_yarn' and model.lora.rank == 2
  case = np.load(GOLDEN / 'peft' / 'expected.npz')
  params = lora.join(whole['params'], jax.tree.map(jnp.asarray, own), model)
  out = jax.jit(Transformer(model).apply)(
    whole | {'params': params}, case['tokens']
  )
  np.testing.assert_allclose(out.logits, case['logits'], atol=2e-4)
  peft_files.export(tmp_path / 'again', model, own, name)
  files = [
    folder / peft_files.WEIGHTS
    for folder in (GOLDEN / 'peft', tmp_path / 'again')
  ]
  with safetensors.File(files[0]) as a, safetensors.File(files[1]) as b:
    assert a.entries.keys() == b.entries.keys()
    for key in a.entries:
      np.testing.assert_array_equal(a.read(key), b.read(key))


def test_a_matrix_of_another_order_is_refused(monkeypatch):
  read = safetensors.File.read
  monkeypatch.setattr(safetensors.File, 'read', lambda *a: read(*a).T)
  with pytest.raises(ConfigError, match='are of another model'):
    peft_files.load(GOLDEN / 'peft', released('v3_yarn')[0])


def recipe(base=''):
  config = freeze(lora_recipes.get_config('tiny'))
  model = dataclasses.replace(config.model, base='trained', dtype='float32')
  run = dataclasses.replace(config.run, base=base)
  return dataclasses.replace(config, model=model, run=run)


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
def test_an_adapter_of_peft_becomes_a_run(tmp_path):
  """The run has its numbers, over the base that is named."""
  own = recipe(str(GOLDEN / 'v3_yarn'))
  plus = dataclasses.replace(own.model.lora, plus=4.0)
  own = dataclasses.replace(
    own, model=dataclasses.replace(own.model, lora=plus)
  )
  rl = RLConfig(task='sort8', beta=0.1, max_new=64)
  own = dataclasses.replace(own, rl=rl)
  convert.adapters_to_run(GOLDEN / 'peft', tmp_path / 'run', own)
  plain = dataclasses.replace(released('v3_yarn')[0], lora=LoRAConfig(plus=4.0))
  model, want, _ = peft_files.load(GOLDEN / 'peft', plain)
  config, restored = load.load_state(tmp_path / 'run')
  assert config.model.lora == model.lora
  chex.assert_trees_all_equal(jax.device_get(restored.state.params), want)
  reference = restored.state.reference['params']
  chex.assert_trees_all_equal(reference, restored.state.params)
  _, variables = load.load_run(tmp_path / 'run')
  frozen = [w for w in leaves(variables['params']) if is_frozen(w)]
  assert sum(w.a is not None for w in frozen) >= 7
  like = released('v3_yarn')[1]['params']
  bare = lambda w: w.bare if is_frozen(w) else w
  base = jax.tree.map(bare, variables['params'], is_leaf=is_frozen)
  chex.assert_trees_all_equal(dense(base, like), like)
  convert.to_huggingface(tmp_path / 'run', tmp_path / 'again')
  pair = [x / peft_files.WEIGHTS for x in (GOLDEN / 'peft', tmp_path / 'again')]
  with safetensors.File(pair[0]) as a, safetensors.File(pair[1]) as b:
    for key in a.entries:
      np.testing.assert_array_equal(a.read(key), b.read(key))


@pytest.mark.parametrize(
  'change, base, text',
  [
    ({}, '', "its base 'v3_yarn' is no folder here"),
    ({'peft_type': 'LOHA'}, '', 'is .LOHA., not LORA'),
    ({'use_dora': True}, '', 'use_dora=True is not computed'),
    ({'use_qalora': True}, '', 'use_qalora=True is not computed'),
    ({'init_lora_weights': 'pissa_niter_4'}, '', "'pissa_niter_4' is not"),
    ({'target_modules': [1, 'q_proj']}, '', 'is no list of names'),
    ({'target_parameters': [1]}, '', 'is no list of names'),
    ({'r': 0}, '', 'r=0 is no rank'),
    ({'r': 3}, 'v3_yarn', 'are of another model'),
    ({}, 'v2_lite', 'q_a_proj'),
  ],
)
def test_other_adapters_are_refused_in_a_line(change, base, text, tmp_path):
  folder = tmp_path / 'peft'
  shutil.copytree(GOLDEN / 'peft', folder)
  path = folder / peft_files.CONFIG
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  own = recipe(base and str(GOLDEN / base))
  with pytest.raises(ConfigError, match=text) as error:
    convert.adapters_to_run(folder, tmp_path / 'run', own)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_a_base_within_the_target_is_not_deleted(tmp_path):
  target = tmp_path / 'run'
  shutil.copytree(GOLDEN / 'v3_yarn', target / 'base')
  (target / 'checkpoints').mkdir()
  (target / 'config.json').write_text('{}')
  own = recipe(str(target / 'base'))
  with pytest.raises(ConfigError, match='run.base=.*lies in the target'):
    convert.adapters_to_run(GOLDEN / 'peft', target, own, force=True)
  assert (target / 'base' / 'config.json').exists()


def test_flags_of_whole_models_are_refused_before_all_else(
  call, monkeypatch, tmp_path
):
  words = [f'--target={tmp_path}/out', f'--source={GOLDEN}/peft']
  for flag, text in (
    ('--check', 'adapters of .* are none'),
    ('--merge', 'and adapters apart; convert to a run first'),
    ('--dtype=bfloat16', 'a run holds float32'),
    ('--power_of_two', 'a run holds float32'),
  ):
    code, _, err = call('convert', *words, flag)
    assert code == 2 and re.search(f'{flag[:5]}.*{text}', err), err
  words[1] = f'--source={GOLDEN}/v2_lite'
  code, _, err = call('convert', *words, '--merge')
  assert code == 2 and '--merge: a run holds float32; convert' in err
  run = types.SimpleNamespace(model=released('v3_yarn')[0])
  run.model = dataclasses.replace(run.model, lora=LoRAConfig(rank=2))
  monkeypatch.setattr(workdir, 'is_run', lambda _: True)
  monkeypatch.setattr(workdir, 'read_config', lambda _: run)
  code, _, err = call('convert', *words, '--check')
  assert code == 2 and re.search('--check: .* adapters of .* are none', err)
  assert not [*tmp_path.iterdir()]


def test_plus_is_the_rate_of_b():
  """LoRA+: Adam's first step moves B `plus` times as far, and A as far."""
  model = released('v2_lite')[0]
  base = released('v2_lite')[1]['params']

  def moved(plus):
    own = LoRAConfig(rank=2, targets=('o_proj',), plus=plus)
    with_plus = dataclasses.replace(model, lora=own)
    adapters = random_adapters(with_plus)

    def pairs(adapters):
      params = lora.join(base, adapters, with_plus)
      w = params['moe']['attention']['w_out']
      return w.a, w.b

    def loss(adapters):
      return sum(jnp.sin(x).sum() for x in pairs(adapters))

    @jax.jit
    def step(adapters):
      tx = optax.adam(1e-3, eps=1e-30)
      updates, _ = tx.update(jax.grad(loss)(adapters), tx.init(adapters))
      after = optax.apply_updates(adapters, updates)
      return jax.tree.map(jnp.subtract, pairs(after), pairs(adapters))

    return step(adapters)

  (a, b), (a_plus, b_plus) = moved(1.0), moved(4.0)
  np.testing.assert_allclose(jnp.abs(a_plus), jnp.abs(a), rtol=1e-3)
  np.testing.assert_allclose(jnp.abs(b_plus), 4 * jnp.abs(b), rtol=1e-3)


@pytest.mark.parametrize(
  'change, text',
  [
    (dict(lora=LoRAConfig(rank=4096)), 'lora.rank=4096'),
    (dict(lora=LoRAConfig(rank=2, targets=('w_q',))), "'w_q' is no product"),
    (dict(lora=LoRAConfig(rank=2, targets=('q_a_proj',))), 'is no product'),
  ],
)
def test_refused_adapters(change, text):
  model = dataclasses.replace(released('v2_lite')[0], **change)
  with pytest.raises(ConfigError, match=text):
    jax.eval_shape(
      functools.partial(lora.boxed, model=model), jax.random.key(0)
    )


@pytest.mark.parametrize(
  'keys, text',
  [
    ({'model.base': 'int4'}, 'set model.lora.rank'),
    ({'model.lora.rank': 2}, 'set run.base'),
    ({'model.lora.rank': 2, 'run.base': '/nowhere'}, 'is no folder'),
    ({'model.lora.rank': 2, 'optim.optimizer': 'muon'}, "use 'adamw'"),
    ({'model.lora.rank': 2, 'model.precision': 'fp8_block'}, "set 'bf16'"),
    ({'model.lora.rank': 999999}, 'lora.rank=999999: '),
    ({'model.lora.rank': 2, 'mesh.stage': 2}, 'use mesh.fsdp'),
    (
      {'model.lora.rank': 2, 'model.base': 'int4', 'model.moe.width': 99},
      "sums over 99 numbers, and two of them are a byte; use 'int8'",
    ),
    ({'model.lora.targets': ()}, 'names no matrix'),
  ],
)
def test_refused_configs(keys, text):
  values = thaw(Config())
  values.model.bos_id = values.model.eos_id = 0
  for key, value in keys.items():
    *groups, name = key.split('.')
    functools.reduce(getattr, groups, values)[name] = value
  with pytest.raises(ConfigError, match=text):
    config = freeze(values)
    frozen_base.check(config)
    frozen_base.check_folder(config)


def test_two_heads_are_no_gate_and_up():
  """Only gate and up are two axes of the codes, whatever the lengths are."""
  model = released('v2_lite')[0]
  mla = dataclasses.replace(model.mla, heads=2)
  boxed = lora.boxed_base(dataclasses.replace(model, mla=mla), 'float32')
  leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_frozen)
  columns = {p[-1].key: w.columns for p, w in leaves if is_frozen(w)}
  assert columns.pop('w_gate_up') == 2
  assert set(columns.values()) == {1} and 'w_k_up' in columns


def test_another_base_is_refused():
  config = types.SimpleNamespace(run=types.SimpleNamespace(base='there'))
  base = frozen_base.Base(fingerprint='a')
  frozen_base.compare(base, {'base': 'a'}, config, 3)
  with pytest.raises(ConfigError, match='step 3'):
    frozen_base.compare(base, {'base': 'b'}, config, 3)


@pytest.fixture
def adapted(monkeypatch):
  """A config with adapters that every folder is a run of."""
  config = freeze(tiny.get_config('micro'))
  model = dataclasses.replace(config.model, lora=LoRAConfig(rank=2))
  run = dataclasses.replace(config.run, base='there')
  config = dataclasses.replace(config, model=model, run=run)
  monkeypatch.setattr(workdir, 'is_run', lambda _: True)
  monkeypatch.setattr(workdir, 'read_config', lambda _: config)
  return config


def test_a_warm_start_has_the_base_of_its_origin(
  adapted, monkeypatch, tmp_path
):
  monkeypatch.setattr(warm_start, 'check_tokenizer', lambda *_: None)
  monkeypatch.setattr(program, 'state_shapes', lambda *_: None)
  restored = types.SimpleNamespace(step=3, facts={'base': 'b'}, state=None)
  monkeypatch.setattr(store, 'restore', lambda *_, **__: restored)
  base = frozen_base.Base(fingerprint='a')
  setup = types.SimpleNamespace(config=adapted, mesh=None, base=base)
  begin = functools.partial(
    warm_start.begin, setup, warm_start.Origin(str(tmp_path))
  )
  with pytest.raises(ConfigError, match="base='there': .*adapters of step 3"):
    begin()
  for change, text in (
    (dict(lora=LoRAConfig(rank=2, alpha=1.0)), 'lora.alpha: 1.0 != 32.0'),
    (dict(lora=LoRAConfig()), 'lora.rank: 0 != 2'),
    (dict(base='int4'), "base: 'int4' != 'trained'"),
  ):
    model = dataclasses.replace(adapted.model, **change)
    setup.config = dataclasses.replace(adapted, model=model)
    with pytest.raises(ConfigError, match=f'adapters are others.*{text}'):
      begin()


def test_an_export_of_adapters_is_whole_or_not_there(
  adapted, monkeypatch, tmp_path
):
  target = tmp_path / 'out'
  write = functools.partial(convert.to_huggingface, tmp_path / 'run', target)
  for flag, value in (('fp8', True), ('power_of_two', True)):
    with pytest.raises(ConfigError, match=f'--{flag}: adapters are written'):
      write(**{flag: value})
  with pytest.raises(ConfigError, match='--dtype: adapters are written'):
    write(dtype='bfloat16')
  with pytest.raises(ConfigError, match='no adapters of the dense and shared'):
    write()
  own = dataclasses.replace(adapted.model.lora, targets=('attention',))
  model = dataclasses.replace(adapted.model, lora=own)
  adapted = dataclasses.replace(adapted, model=model)
  monkeypatch.setattr(workdir, 'read_config', lambda _: adapted)
  restored = types.SimpleNamespace(state=types.SimpleNamespace(params={}))
  monkeypatch.setattr(load, 'load_state', lambda *_, **__: (adapted, restored))

  def interrupted(folder, *_):
    (folder / peft_files.CONFIG).write_text('new')
    raise OSError('the disk is full')

  monkeypatch.setattr(peft_files, 'export', interrupted)
  with pytest.raises(OSError):
    write()
  assert not [*tmp_path.iterdir()]
  target.mkdir()
  for name in (peft_files.CONFIG, peft_files.WEIGHTS):
    (target / name).write_text('old')
  with pytest.raises(ConfigError, match='--force replaces it'):
    write()
  with pytest.raises(OSError):
    write(force=True)
  assert [*tmp_path.iterdir()] == [target]
  assert {path.read_text() for path in target.iterdir()} == {'old'}
  (target / 'notes').write_text('mine')
  with pytest.raises(ConfigError, match='is no folder of adapters alone'):
    write(force=True)


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
def test_a_run_resumes_refuses_and_merges(tmp_path, no_pictures):
  """Resumed runs are bit for bit those that were not interrupted."""
  plain = freeze(tiny.get_config('smoke')).model
  plain = dataclasses.replace(plain, precision='bf16', layers=2)
  for seed, name in enumerate(('base', 'other')):
    init = random_weights(plain, seed)
    save_huggingface(tmp_path / name, plain, init)

  def config(steps, base='base'):
    config = freeze(tiny.get_config('smoke'))
    model = dataclasses.replace(
      plain,
      base='int8',
      lora=LoRAConfig(rank=2, targets=('attention', 'experts'), scale='root'),
    )
    run = dataclasses.replace(
      config.run,
      steps=steps,
      save_every=2,
      eval_every=0,
      sample_every=0,
      base=str(tmp_path / base),
    )
    optim = dataclasses.replace(config.optim, optimizer='adamw', warmup_steps=0)
    return dataclasses.replace(config, model=model, run=run, optim=optim)

  train.run(config(4), tmp_path / 'whole')
  train.run(config(2), tmp_path / 'halves')
  train.run(config(4), tmp_path / 'halves')
  states = [load.load_state(tmp_path / x)[1].state for x in ('whole', 'halves')]
  chex.assert_trees_all_equal(*states)
  sizes = [x.size for x in jax.tree.leaves(states[0].params)]
  assert sum(sizes) < 0.2 * sum(x.size for x in jax.tree.leaves(init))
  with pytest.raises(ConfigError, match='are not those that the adapters'):
    train.run(config(6, 'other'), tmp_path / 'whole')
  warm = train.Options(init=str(tmp_path / 'whole'))
  with pytest.raises(ConfigError, match='are not those that the adapters'):
    train.run(config(1, 'other'), tmp_path / 'warm', warm)
  train.run(config(1), tmp_path / 'begun', warm)
  _, adapted = load.load_run(tmp_path / 'whole')
  convert.to_huggingface(tmp_path / 'whole', tmp_path / 'merged', merge=True)
  model, merged = load_huggingface(tmp_path / 'merged')
  own = config(4).model
  np.testing.assert_allclose(
    logits(model, merged),
    logits(dataclasses.replace(own, dtype=model.dtype), adapted),
    atol=2e-3,
  )
  for name, options in (
    ('half', {'dtype': 'bfloat16'}),
    ('eight', {'fp8': True}),
  ):
    convert.to_huggingface(
      tmp_path / 'whole', tmp_path / name, merge=True, **options
    )
    _, narrow = load_huggingface(tmp_path / name)
    off = jax.tree.map(
      lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), narrow, merged
    )
    bound = {'half': 2**-8, 'eight': 2**-4}[name]
    assert bound / 8 < max(leaves(off['params'])) < bound
  plain_logits = logits(*load_huggingface(tmp_path / 'base'))
  assert jnp.abs(logits(model, merged) - plain_logits).max() > 0.01
  convert.to_huggingface(tmp_path / 'whole', tmp_path / 'peft')
  again, params, _ = peft_files.load(tmp_path / 'peft', plain)
  # PEFT names matrices, not their groups.
  named = dataclasses.replace(own.lora, targets=again.lora.targets)
  assert again.lora == named
  assert lora.targets(again) == lora.targets(own)
  chex.assert_trees_all_equal(params, jax.device_get(states[0].params))
