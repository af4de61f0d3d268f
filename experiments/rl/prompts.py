"""Prompts: the token ids of a question, by the template of the config.

The ids are those of fine-tuning (`training.examples`): one bos, then text. A
question goes into a template by concatenation, since it may hold braces, and
no text becomes a special token.
"""

from __future__ import annotations

import pathlib

import numpy as np

from mla_moe.types import Int

from ..data.tokenizer import Tokenizer
from ..serving import template
from . import tasks
from .tasks import Question

TEMPLATES = {'plain': '{prompt}', 'r1_zero': tasks.R1_ZERO}


class Prompts:
  """The prompts of a model, and answers to them as examples for fine-tuning.

  `template` is the text around a question, '{prompt}' in its place: it may
  begin the answer, as R1's chat template begins a thought.
  """

  def __init__(
    self,
    name: str,
    words: Tokenizer,
    folder: pathlib.Path | None,
    own: str = '',
  ):
    """Opens a template.

    Args:
      name: 'plain', 'r1_zero' or 'chat', which is the template in `folder`.
      words: the tokenizer.
      folder: of the tokenizer, if there is one.
      own: a chat template in the place of the one of `folder`.

    Raises:
      ConfigError: no chat template.
    """
    self._words = words
    self._chat = None
    self.template = TEMPLATES.get(name, '')
    self._opening = ''
    if name == 'chat':
      self._chat = template.opened(folder, words, own)
      self._opening = self._chat.opening()
      self.template = '{prompt}' + self._opening

  def ids(self, item: Question) -> Int[np.ndarray, ' P']:
    """Returns the ids of a question's prompt.

    A question that is a chat goes message by message into the chat template,
    and as its joined text into the others.
    """
    if self._chat:
      return self._chat.prompt(_messages(item))
    words = self._words
    both = np.append(words.bos_id, words.encode(self._text(item)))
    return both.astype(np.int32)

  def row(self, item: Question, answer: str) -> dict:
    """Returns a row for `experiments.sft`, whose prompt has the same ids.

    A chat's row has the whole answer, with the thought that the prompt begins:
    the template of another model may not begin it.
    """
    if not self._chat:
      return {'prompt': self._text(item), 'completion': answer}
    turns = [*_messages(item), ('assistant', self._opening + answer)]
    return {'messages': [{'role': r, 'content': text} for r, text in turns]}

  def _text(self, item: Question) -> str:
    before, _, after = self.template.partition('{prompt}')
    return before + item.text + after


def _messages(item: Question) -> list[tuple[str, str]]:
  """Returns the (role, text) pairs of a question as a chat."""
  return list(item.messages) or [('user', item.text)]
