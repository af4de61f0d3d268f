"""Text from a model by repeated full forward passes over one window.

It needs no cache and no second form of the model, so it is what the training
loop shows its samples with.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe.config import ModelConfig
from mla_moe.model import transformer


@functools.partial(jax.jit, static_argnames=('config',))
def _continue(variables, tokens, start, end, key, temperature, *, config):
  """tokens [1, W] with places start..end-1 filled in."""
  network = transformer.Transformer(config)

  def one(i, tokens):
    out = network.apply(variables, tokens, method=network.features)
    last = jax.lax.dynamic_index_in_dim(out.hidden, i - 1, 1, keepdims=False)
    head = network.apply(variables, method=network.head).astype(last.dtype)
    logits = (last @ head)[0].astype(jnp.float32)
    draw = jax.random.categorical(
      jax.random.fold_in(key, i), logits / jnp.maximum(temperature, 1e-6)
    )
    pick = jnp.where(temperature > 0, draw, logits.argmax())
    return tokens.at[0, i].set(pick.astype(tokens.dtype))

  return jax.lax.fori_loop(start, end, one, tokens)


def sample(
  config: ModelConfig,
  variables,
  prompt: np.ndarray,
  new: int,
  window: int,
  *,
  temperature: float = 0.7,
  seed: int = 0,
) -> np.ndarray:
  """The `new` tokens after `prompt` [T] int32; greedy at temperature 0.

  What does not fit the window is cut from the prompt's front.
  """
  prompt = np.asarray(prompt, np.int32)[-(window - new) :]
  tokens = np.zeros((1, window), np.int32)
  tokens[0, : len(prompt)] = prompt
  end = len(prompt) + new
  out = _continue(
    variables,
    tokens,
    np.int32(len(prompt)),
    np.int32(end),
    jax.random.key(seed),
    np.float32(temperature),
    config=config,
  )
  return np.asarray(out)[0, len(prompt) : end]
