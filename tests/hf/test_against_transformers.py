"""transformers computes the same logits from the same folders."""

import dataclasses
import importlib
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn
from releases import ROOT, same_bytes, tensors

from mla_moe import Transformer, load_huggingface, save_huggingface
from mla_moe.config import freeze


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize(
  'words',
  [
    ['--kind=v2', '--seed=3', 'q_lora_rank=32'],
    ['--kind=v3', '--seed=4', 'n_group=1', 'topk_group=1'],
    ['--kind=v3', '--seed=5', '--release', 'hidden_size=160'],
  ],
)
def test_fresh_goldens_hold(words, tmp_path):
  """Cases of other sizes than those kept, made by transformers just now."""
  pytest.importorskip('transformers')
  pytest.importorskip('torch')
  command = [sys.executable, str(ROOT / 'tests' / 'make_goldens.py')]
  subprocess.run([*command, f'--folder={tmp_path}', *words], check=True)
  config, variables = load_huggingface(tmp_path)
  expected = np.load(tmp_path / 'expected.npz')
  run = jax.jit(Transformer(config).apply)
  out = run(variables, expected['tokens'])
  chex.assert_trees_all_close(out.logits, expected['logits'], atol=2e-4)
  greedy = run(variables, expected['greedy']).logits.argmax(-1)
  np.testing.assert_array_equal(greedy[:, 23:-1], expected['greedy'][:, 24:])
  release = '--release' in words
  assert (out.mtp_logits is not None) == release
  if release:
    both = out.mtp_logits[0], expected['mtp_logits']
    chex.assert_trees_all_close(*both, atol=2e-4)
    save_huggingface(tmp_path / 'out', config, variables, fp8=True)
    same_bytes(tensors(tmp_path), tensors(tmp_path / 'out'))


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('name', ['tiny', 'deepseek_v2_lite', 'moonlight_16b'])
def test_transformers_loads_what_is_saved(name, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  module = importlib.import_module(f'configs.{name}')
  config = freeze(module.get_config('smoke')).model
  config = dataclasses.replace(config, dtype='float32', init_std=0.08)
  tokens = np.random.default_rng(0).integers(0, config.vocab, (2, 48))
  network = Transformer(config)
  variables = nn.unbox(network.init(jax.random.key(0), tokens[:, :8]))
  random = np.random.default_rng(1)
  router = variables.get('router', {})
  noise = lambda b: random.normal(0, 0.05, b.shape).astype(np.float32)
  variables['router'] = jax.tree.map(noise, router)
  # "Trained": a few steps of plain descent, which leave nothing symmetric.
  loss = lambda params: (
    network.apply({**variables, 'params': params}, tokens).logits[..., 0].mean()
  )
  grad = jax.jit(jax.grad(loss))
  for steps in (0, 3):
    for _ in range(steps):
      variables['params'] = jax.tree.map(
        lambda p, g: p - 0.5 * g, variables['params'], grad(variables['params'])
      )
    save_huggingface(tmp_path / f'{steps}', config, variables)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / f'{steps}', dtype=torch.float32
    )
    with torch.no_grad():
      logits = theirs(torch.from_numpy(tokens)).logits.numpy()
    ours = network.apply(variables, tokens).logits
    chex.assert_trees_all_close(np.asarray(ours), logits, atol=2e-4)
