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
  that wait, with their index; alternatives: whether its samples want them;
  scored: whether the prompt's own scores are wanted; pages: of the cache, with
  the first `filled` tokens; scores: a part for each chunk of them; logits and
  hidden: of the last token, once all of them are in.
  """

  ids: np.ndarray
  max_new_tokens: int
  stop_ids: frozenset
  knobs: sampling.Knobs
  tickets: dict[int, int]
  alternatives: bool = False
  scored: bool = False
  pages: list[int] = dataclasses.field(default_factory=list)
  filled: int = 0
  scores: list[programs.Scores] = dataclasses.field(default_factory=list)
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
      table,
      one(start),
      tokens,
      one(len(part)),
      after,
      one(len(pairs)),
      np.bool_(self.scored),
    )

  def add_scores(self, scores: programs.Scores) -> None:
    """Adds the scores of the next chunk, padded, on the device."""
    real = len(self.ids[self.filled + 1 :][: len(scores.ranks)])
    part = jax.tree.map(lambda x: x[:real], jax.device_get(scores))
    self.scores.append(part)

  def prompt_scores(self) -> programs.Scores | None:
    """Returns the scores of all tokens but the first, None if not wanted."""
    if not self.scored:
      return None
    return jax.tree.map(lambda *x: np.concatenate(x), *self.scores)

  def forget(self) -> None:
    """Begins the prompt again: its pages are lost."""
    self.pages, self.filled, self.scores = [], 0, []
    self.logits = self.hidden = None

  def next_sample(self) -> tuple[int, sampling.Knobs]:
    """Takes the first sample that waits; returns its ticket and its knobs."""
    ticket = next(iter(self.tickets))
    i = self.tickets.pop(ticket)
    return ticket, jax.tree.map(lambda x: x[i : i + 1], self.knobs)
