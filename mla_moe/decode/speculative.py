"""Speculative decoding: the MTP module drafts a token, the model checks it.

In one pass the main model reads a row's last token and the draft after it, so
that it has the distribution p of the draft's position and that of the next one.
The draft d was drawn from the module's distribution q. It is accepted with
probability min(1, p(d) / q(d)); otherwise a token drawn from max(p - q, 0),
normalised, takes its place (Leviathan et al. 2023). So the tokens have the
distribution p, and greedy rows, where p and q are one token each, emit the
same tokens as without drafts. An accepted draft brings a second token in the
same pass. V3 accepts 85 to 90 % of its drafts (section 5.4.3).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from mla_moe.decode import sampling
from mla_moe.types import Array, Bool, Float, Int


class Verdict(NamedTuple):
  """tokens [B, 2] int32; the second one counts where `accepted` [B] is true."""

  tokens: Array
  accepted: Array


def propose(
  logits: Float[Array, 'B V'],
  seen: Bool[Array, 'B V'],
  knobs: sampling.Knobs,
  position: Int[Array, ' B'],
) -> tuple[Int[Array, ' B'], Float[Array, 'B V']]:
  """Returns a draft for `position`, and the log-probabilities q behind it."""
  log_q = sampling.distribution(logits, seen, knobs)
  return sampling.draw(log_q, knobs, position, sampling.DRAFT), log_q


def verify(
  logits: Float[Array, 'B two V'],
  drafts: Int[Array, ' B'],
  log_q: Float[Array, 'B V'],
  seen: Bool[Array, 'B V'],
  knobs: sampling.Knobs,
  position: Int[Array, ' B'],
) -> Verdict:
  """Returns the token for `position` and, after an accepted draft, the next.

  Args:
    logits: the main model's, for `position` and for the one after the draft.
    drafts: of `propose`.
    log_q: of `propose`.
    seen: whether the row already has the token; without the draft.
    knobs: of the rows.
    position: of the draft.
  """
  pick = lambda x: jnp.take_along_axis(x, drafts[:, None], axis=-1)[:, 0]
  log_p = sampling.distribution(logits[:, 0], seen, knobs)
  chance = jnp.exp(pick(log_p) - pick(log_q))
  accepted = sampling.uniform(knobs, position, sampling.ACCEPT) < chance

  residual = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0)
  # No residual: p = q, and a rejection is a matter of rounding.
  some = residual.sum(-1, keepdims=True) > 0
  residual = jnp.where(some, jnp.log(residual), log_p)
  replacement = sampling.draw(residual, knobs, position, sampling.RESIDUAL)

  rows = jnp.arange(len(drafts))
  seen = seen.at[rows, drafts].set(True)
  log_p = sampling.distribution(logits[:, 1], seen, knobs)
  second = sampling.draw(log_p, knobs, position + 1)
  first = jnp.where(accepted, drafts, replacement)
  return Verdict(jnp.stack([first, second], axis=1), accepted)
