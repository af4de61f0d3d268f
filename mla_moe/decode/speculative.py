"""A token drafted by the MTP module, and one pass that checks and adds one.

The main model reads a row's newest token and the draft after it in a single
absorbed pass, which gives the distribution p at both places. The draft d, drawn
from q, is accepted with probability min(1, p(d)/q(d)); otherwise a token from
max(p - q, 0), normalised, takes its place (Leviathan et al. 2023): what comes
out is distributed as p, and a greedy row, whose distributions are certain,
emits what it would have without drafts. The module's cache follows the main
one (V3 section 5.4.3 accepts 85 to 90% of its drafts).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from mla_moe.decode import sampling
from mla_moe.types import Array, Bool, Float, Int


class Verdict(NamedTuple):
  """tokens [B, 2] int32, the second of which counts where accepted [B]."""

  tokens: Array
  accepted: Array


def propose(
  logits: Float[Array, 'B V'],
  seen: Bool[Array, 'B V'],
  how: sampling.Knobs,
  position: Int[Array, ' B'],
) -> tuple[Int[Array, ' B'], Float[Array, 'B V']]:
  """A draft for `position`, and the log-probabilities it was drawn from."""
  drawn_from = sampling.distribution(logits, seen, how)
  use = sampling.DRAFT
  return sampling.draw(drawn_from, how, position, use), drawn_from


def verify(
  logits: Float[Array, 'B two V'],
  drafts: Int[Array, ' B'],
  drawn_from: Float[Array, 'B V'],
  seen: Bool[Array, 'B V'],
  how: sampling.Knobs,
  position: Int[Array, ' B'],
) -> Verdict:
  """The tokens for `position` and, where the draft is accepted, the next.

  Args:
    logits: the main model's for `position`, and for the one after the draft.
    drafts: of `propose`, like `drawn_from`.
    seen: tokens of the row so far, the draft not included.
  """
  pick = lambda x: jnp.take_along_axis(x, drafts[:, None], axis=-1)[:, 0]
  p = sampling.distribution(logits[:, 0], seen, how)
  chance = jnp.exp(pick(p) - pick(drawn_from))
  accepted = sampling.uniform(how, position, sampling.ACCEPT) < chance

  rest = jnp.maximum(jnp.exp(p) - jnp.exp(drawn_from), 0.0)
  # Where p and q are equal but for rounding, all was accepted but for rounding.
  some = rest.sum(-1, keepdims=True) > 0
  rest = jnp.where(some, jnp.log(rest), p)
  instead = sampling.draw(rest, how, position, sampling.RESIDUAL)

  rows = jnp.arange(len(drafts))
  seen = seen.at[rows, drafts].set(True)
  after = sampling.distribution(logits[:, 1], seen, how)
  bonus = sampling.draw(after, how, position + 1)
  first = jnp.where(accepted, drafts, instead)
  return Verdict(jnp.stack([first, bonus], axis=1), accepted)
