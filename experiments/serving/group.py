"""The samples of one prompt that have no row yet."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from mla_moe.decode import sampling

from . import programs


@dataclasses.dataclass(eq=False)  # a group equals itself alone: it has arrays
class Group:
  """A prompt in the scheduler's queue.

  ids [T] int32: the prompt; knobs: of all its samples; tickets: of the samples
  that wait, with their index; pages: of the cache, with the first `filled`
  tokens; logits and hidden: of the last token, once all of them are in.
  """

  ids: np.ndarray
  max_new_tokens: int
  stop_ids: frozenset
  knobs: sampling.Knobs
  tickets: dict[int, int]
  pages: list[int] = dataclasses.field(default_factory=list)
  filled: int = 0
  logits: jax.Array | None = None
  hidden: jax.Array | None = None

  def chunk(self, size: int, row_pages: int) -> programs.Chunk:
    """Returns the prompt's next part, up to `size` tokens, padded to `size`."""
    start, stop = self.filled, self.filled + size
    tokens, after = np.zeros((2, 1, size), np.int32)
    part, pairs = self.ids[start:stop], self.ids[start + 1 : stop + 1]
    tokens[0, : len(part)], after[0, : len(pairs)] = part, pairs
    table = np.zeros((1, row_pages), np.int32)
    table[0, : len(self.pages)] = self.pages
    one = lambda value: np.array([value], np.int32)
    return programs.Chunk(
      table, one(start), tokens, one(len(part)), after, one(len(pairs))
    )

  def next_sample(self) -> tuple[int, sampling.Knobs]:
    """Takes the first sample that waits; returns its ticket and its knobs."""
    ticket = next(iter(self.tickets))
    i = self.tickets.pop(ticket)
    return ticket, jax.tree.map(lambda x: x[i : i + 1], self.knobs)
