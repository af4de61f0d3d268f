"""Compares each layer's output of a released model with transformers'.

Both sides compute the same 64 random tokens in float32. A wrong weight or a
misread field of config.json then shows at the first layer that it changes.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile

import numpy as np

from mla_moe.config import ConfigError, ModelConfig
from mla_moe.types import PyTree


def compare(folder: pathlib.Path) -> float:
  """Prints each layer's largest error; returns that of the logits.

  transformers cannot load FP8 without a GPU, and not each family's words. Such
  a folder is first saved in float32 and in DeepSeek's words (or Mistral's), in
  a temporary folder: they compute the same.

  Raises:
    ConfigError: transformers is not installed.
  """
  try:
    import torch
    import transformers
  except ImportError:
    raise ConfigError(
      '--check needs transformers: pip install torch transformers'
    ) from None
  from mla_moe import files, load_huggingface, save_huggingface
  from mla_moe.hf import config_json, dialects, source

  config, variables = load_huggingface(folder)
  values = files.read_json(source.config_path(folder))
  native = values.get('model_type') in ('deepseek_v2', 'deepseek_v3')
  release = dataclasses.replace(config.release, family='')
  plain = dataclasses.replace(config, release=release)
  family = config_json.family_of(plain)
  if family == 'mistral4':  # transformers reads its experts in no other layout
    release = dataclasses.replace(release, experts='fused')
    plain = dataclasses.replace(config, release=release)
  # By its name: AutoModelForCausalLM does not know Mistral 4.
  name = dialects.dialect(family).architectures[0]
  tokens = np.random.default_rng(0).integers(0, config.vocab, (1, 64))
  with tempfile.TemporaryDirectory() as scratch:
    loadable = folder
    if values.get('quantization_config') or not native:
      loadable = pathlib.Path(scratch) / 'plain'
      save_huggingface(loadable, plain, variables)
    model = getattr(transformers, name).from_pretrained(
      loadable,
      dtype=torch.float32,
      attn_implementation='eager',
      trust_remote_code=False,
    )
    with torch.no_grad():
      out = model(torch.from_numpy(tokens), output_hidden_states=True)
  ours = _outputs(config, variables, tokens)
  # transformers' last hidden state has been through the final norm.
  theirs = [x.numpy() for x in (*out.hidden_states, out.logits)]
  names = ['embedding', *(f'layer {i}' for i in range(config.layers - 1))]
  names += ['final norm', 'logits']
  error = 0.0
  for name, a, b in zip(names, ours, theirs, strict=True):
    error = float(np.abs(a - b).max())
    print(f'{name:12s} largest error {error:.2e} of {np.abs(b).max():.2e}')
  return error


def _outputs(
  config: ModelConfig, variables: PyTree, tokens: np.ndarray
) -> list[np.ndarray]:
  """Returns our embedding, every layer but the last, final norm and logits."""
  import jax
  import jax.numpy as jnp

  from mla_moe import Transformer
  from mla_moe.model import block, indexer, rope

  params, router = variables['params'], variables['router']
  tokens = jnp.asarray(tokens, jnp.int32)
  positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  angles = rope.angles(positions, config.mla.rope_dim, config.mla.rope)
  carry = params['embedding'][tokens], indexer.no_sets(tokens, config.dsa)
  outputs = [carry[0]]
  for name, count in (
    ('dense', config.dense_layers),
    ('moe', config.moe_layers),
  ):
    apply = jax.jit(block.Block(config, name == 'moe').apply)
    if name == 'moe':
      sets = indexer.enter(carry[1], config.dense_layers, config.dsa)
      carry = carry[0], sets
    for i in range(count):
      take = lambda leaf, i=i: leaf[i]
      layer = {'params': jax.tree.map(take, params[name])}
      if name in router:
        layer['router'] = jax.tree.map(take, router[name])
      carry, _ = apply(layer, carry, angles, None, None)
      outputs.append(carry[0])
  apply = jax.jit(Transformer(config).apply, static_argnames='method')
  outputs[-1] = apply(variables, tokens, method='features').hidden
  outputs.append(apply(variables, tokens).logits)
  return [np.asarray(x) for x in outputs]
