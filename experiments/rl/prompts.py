"""Prompts: the token ids of a question, by the template of the config.

The ids are those of fine-tuning (`training.examples`): one bos, then text. A
question goes into a template by concatenation, since it may hold braces, and
no text becomes a special token.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np

from mla_moe.data.tokenizer import Tokenizer
from mla_moe.types import Int

from ..serving import template
from . import tasks

TEMPLATES = {'plain': '{prompt}', 'r1_zero': tasks.R1_ZERO}


def maker(
  name: str, words: Tokenizer, folder: pathlib.Path | None, own: str = ''
) -> Callable[[str], Int[np.ndarray, ' P']]:
  """Returns the map from a question's text to the ids of its prompt.

  Args:
    name: 'plain', 'r1_zero' or 'chat', which is the template in `folder`.
    words: the tokenizer.
    folder: of the tokenizer, if there is one.
    own: a chat template in the place of the one of `folder`.

  Raises:
    ConfigError: no chat template.
  """
  if name == 'chat':
    chat = template.opened(folder, words, own)
    return lambda text: chat.prompt([('user', text)])
  before, _, after = TEMPLATES[name].partition('{prompt}')

  def ids(text: str) -> np.ndarray:
    both = np.append(words.bos_id, words.encode(before + text + after))
    return both.astype(np.int32)

  return ids
