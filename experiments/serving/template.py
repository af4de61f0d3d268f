"""A chat as token ids: the model's template around people's messages.

The template is one's own (--chat_template) or that of the folder
(chat_template.jinja or tokenizer_config.json), run by jinja2 in a process with
limits (`renderer`). Without one it is that of DeepSeek V3 and R1: bos, the
system's text, <｜User｜>, text, <｜Assistant｜>. A message becomes no special
token, even if it spells one: the template gets a mark in place of each message,
and only the template's own text is searched for special tokens.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import numpy as np
from absl import flags

from mla_moe import files, vocabulary
from mla_moe.config import ConfigError
from mla_moe.data.tokenizer import BOS, EOS, Tokenizer
from mla_moe.hf.settings import ASSISTANT as ASSISTANT
from mla_moe.hf.settings import USER as USER
from mla_moe.types import Int

from .. import cli
from . import renderer

FLAGS = flags.FLAGS
_TEMPLATE_BYTES = 2**20
_THINK = '<think>'  # R1's template opens a thought for the model
_MARK = re.compile('\ue000([0-9]+)\ue001')


def define() -> None:
  """Defines the flag of every program that chats."""
  text = "A file with a template in Jinja; '' is the model's."
  cli.define_path('chat_template', '', text)


def own() -> str:
  """Returns the template of --chat_template, '' without one.

  Raises:
    ConfigError: no text file, or no template.
  """
  if not FLAGS.chat_template:
    return ''
  path = pathlib.Path(FLAGS.chat_template)
  try:
    text = files.read_bytes(path, _TEMPLATE_BYTES).decode('utf-8')
  except UnicodeDecodeError:
    raise ConfigError(f'{path}: is no text in UTF-8') from None
  if not text.strip():
    raise ConfigError(f'{path}: is empty')
  _run(text, None)
  return text


def prompt(
  folder: pathlib.Path,
  tokenizer: Tokenizer,
  text: str,
  system: str = '',
  own: str = '',
) -> Int[np.ndarray, ' T']:
  """Returns the ids of a chat with one question, ready for the answer, int32.

  Raises:
    ConfigError: as `encode`.
  """
  messages = [('system', system)] if system else []
  return encode(folder, tokenizer, [*messages, ('user', text)], own)


def encode(
  folder: pathlib.Path,
  tokenizer: Tokenizer,
  messages: list[tuple[str, str]],
  own: str = '',
) -> Int[np.ndarray, ' T']:
  """Returns the ids of a chat, ready for the next answer, int32.

  Args:
    folder: of the template.
    tokenizer: of the model.
    messages: (role, text) each; roles are system, user and assistant.
    own: a template in the place of the folder's.

  Raises:
    ConfigError: a template that does not run, or a tokenizer without the
      special tokens that it needs.
  """
  return opened(folder, tokenizer, own).prompt(messages)


class Template(NamedTuple):
  """A model's template, read once for many chats.

  text: in Jinja; '' is that of V3 and R1. bos, eos: the texts of these tokens.
  special: ids of the added tokens, by their text.
  """

  tokenizer: Tokenizer
  text: str
  bos: str
  eos: str
  special: dict[str, int]

  def prompt(self, messages: list[tuple[str, str]]) -> Int[np.ndarray, ' T']:
    """Returns the ids of a chat as `encode` does."""
    rendered = self._rendered(messages, True)
    texts = [text for _, text in messages]
    return _encode(rendered, texts, self.special, self.tokenizer)

  def opening(self) -> str:
    """Returns '<think>' and the blanks after it if a prompt ends so, or ''."""
    end = self._rendered([('user', '')], True).rpartition(_mark(0))[2]
    return end[end.rfind(_THINK) :] if end.rstrip().endswith(_THINK) else ''

  def answer(self, messages: list[tuple[str, str]]) -> Int[np.ndarray, ' T']:
    """Returns the ids of the last message, an answer, with its end token.

    They follow those of `prompt(messages[:-1])`. If that prompt opens a thought
    already, the answer does not open it again.

    Raises:
      ConfigError: as `encode`, or an answer that does not end in eos.
    """
    text = messages[-1][1]
    opening = self._rendered(messages[:-1], True)
    if opening.rstrip().endswith(_THINK) and text.lstrip().startswith(_THINK):
      text = text.lstrip().removeprefix(_THINK)
      text = text.removeprefix('\n' if opening.endswith('\n') else '')
    mark = _mark(len(messages) - 1)
    _, mark, end = self._rendered(messages, False).rpartition(mark)
    if not mark:
      raise ConfigError('the chat template leaves out an answer')
    special = re.search(_any_of(self.special), end) if self.special else None
    end = end[: special.end()] if special else ''
    ids = _encode(_mark(0) + end, [text], self.special, self.tokenizer)
    eos = self.tokenizer.eos_id
    if end and ids[-1] != eos:
      raise ConfigError(
        f'the chat template ends an answer with token {ids[-1]}, and the model '
        f'stops after {eos}; set config.model.eos_id={ids[-1]}'
      )
    return ids if end else np.append(ids, np.int32(eos))

  def _rendered(self, messages: list[tuple[str, str]], ready: bool) -> str:
    """Returns the template's text with marks, `ready` for the next answer."""
    roles = tuple(role for role, _ in messages)
    if self.text:
      return _render(self.text, roles, self.bos, self.eos, ready)
    for token in (BOS, USER, ASSISTANT):
      if token not in self.special:
        raise ConfigError(
          f'chat: the tokenizer has no token {token!r}, which the template '
          'of V3 and R1 needs; name another one by --chat_template=FILE, or '
          'continue texts without a chat'
        )
    formats = {
      'system': '{}',
      'user': USER + '{}',
      'assistant': ASSISTANT + '{}' + EOS,
    }
    turns = (formats[role].format(_mark(i)) for i, role in enumerate(roles))
    return BOS + ''.join(turns) + (ASSISTANT if ready else '')


def opened(
  folder: pathlib.Path | None, tokenizer: Tokenizer, own: str = ''
) -> Template:
  """Returns the template `own`, or without one that of the folder."""
  special = _special_tokens(tokenizer)
  settings = _settings(folder or pathlib.Path(os.devnull), tokenizer, special)
  text = own or settings['template']
  ends = settings['bos_token'], settings['eos_token']
  return Template(tokenizer, text, *ends, special)


def _settings(
  folder: pathlib.Path, tokenizer: Tokenizer, special: dict[str, int]
) -> dict:
  """Returns the template ('' if there is none) and the texts of bos and eos."""
  path = folder / 'tokenizer_config.json'
  values = files.read_json(path) if path.exists() else {}
  template = values.get('chat_template') or ''
  if isinstance(template, list):  # several, by name
    named = [x for x in template if isinstance(x, dict)]
    named = [x for x in named if x.get('name') == 'default']
    template = named[0].get('template') or '' if named else ''
  if not isinstance(template, str):
    raise ConfigError(f'{path}: chat_template is no text')
  file = folder / 'chat_template.jinja'
  if file.exists():
    try:
      template = files.read_bytes(file, _TEMPLATE_BYTES).decode('utf-8')
    except UnicodeDecodeError:
      raise ConfigError(f'{file}: is no text in UTF-8') from None
  text_of = {index: text for text, index in special.items()}
  bos = text_of.get(tokenizer.bos_id, '')
  eos = text_of.get(tokenizer.eos_id, '')
  return {
    'template': template,
    # A null is a model without such a token.
    'bos_token': vocabulary.text_of(values.get('bos_token', bos)),
    'eos_token': vocabulary.text_of(values.get('eos_token', eos)),
  }


@functools.lru_cache(maxsize=1024)
def _render(
  template: str, roles: tuple[str, ...], bos: str, eos: str, ready: bool
) -> str:
  """Returns the template's text, with a mark in place of each message.

  It depends on the roles alone, so that it is made once for many chats.
  """
  messages = [
    {'role': role, 'content': _mark(i)} for i, role in enumerate(roles)
  ]
  values = {'messages': messages, 'bos_token': bos, 'eos_token': eos}
  return _run(template, values | {'add_generation_prompt': ready})


def _run(template: str, values: dict | None) -> str:
  """Returns the rendered template; without values it is only compiled.

  Raises:
    ConfigError: no jinja2, or a template that fails.
  """
  if importlib.util.find_spec('jinja2') is None:
    raise ConfigError('a chat template needs jinja2: pip install "mla_moe[hf]"')
  request = {'template': template, 'values': values}
  out = subprocess.run(
    [sys.executable, '-P', renderer.__file__],
    input=json.dumps(request | {'seconds': renderer.SECONDS}).encode(),
    capture_output=True,
  )
  if out.returncode:  # the kernel has ended it
    limits = f'{renderer.SECONDS} s or {renderer.MEMORY >> 20} MiB'
    answer = {'error': f'it needs more than {limits}'}
  else:
    answer = json.loads(out.stdout)
  if 'error' in answer:
    raise ConfigError(f'the chat template fails ({answer["error"]})')
  return answer['text']


def _mark(i: int) -> str:
  return f'\ue000{i}\ue001'


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
  """Returns the ids of the added tokens, by their text."""
  core = getattr(tokenizer, 'core', None)
  if core is None:
    return {text: index for index, text in vocabulary.BYTE.special.items()}
  added = core.get_added_tokens_decoder()
  return {token.content: index for index, token in added.items()}


def _any_of(special: dict[str, int]) -> str:
  """Returns the pattern of any of these tokens, a longer one first."""
  return '|'.join(sorted(map(re.escape, special), key=len, reverse=True))


def _encode(rendered, texts, special, tokenizer) -> np.ndarray:
  """Returns the ids of the template's special tokens, and of the text between
  them, where marks stand for `texts`."""
  ids: list[int] = []
  plain = ''

  def flush():
    nonlocal plain
    ids.extend(tokenizer.encode(plain).tolist())
    plain = ''

  pieces = '|'.join([*filter(None, [_any_of(special)]), _MARK.pattern])
  start = 0
  for piece in re.finditer(pieces, rendered):
    plain += rendered[start : piece.start()]
    start = piece.end()
    if piece.group(1) is not None and int(piece.group(1)) < len(texts):
      plain += texts[int(piece.group(1))]
      continue
    if piece.group() not in special:  # a mark that stands for no message
      plain += piece.group()
      continue
    flush()
    ids.append(special[piece.group()])
  plain += rendered[start:]
  flush()
  return np.array(ids, np.int32)
