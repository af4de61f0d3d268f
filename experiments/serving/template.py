"""A chat as token ids: the model's template around people's messages.

The template is one's own (--chat_template) or that of the folder
(chat_template.jinja or tokenizer_config.json), run by jinja2 in a process with
limits (`renderer`). Without one it is that of DeepSeek V3 and R1: bos, the
system's text, <｜User｜>, text, <｜Assistant｜>.

The ids are those of transformers' `apply_chat_template`, but for one thing: a
message becomes no special token, even if it spells one. The template sees the
messages' texts, and a special token is one whose characters the template wrote
itself. Where that cannot be told, the chat is refused.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import NamedTuple

import numpy as np
from absl import flags

from mla_moe import files, vocabulary
from mla_moe.config import ConfigError
from mla_moe.hf.settings import ASSISTANT as ASSISTANT
from mla_moe.hf.settings import USER as USER
from mla_moe.types import Int

from .. import cli
from .. import ends as endings
from .. import prompt as prompts
from ..data.tokenizer import BOS, EOS, Tokenizer
from . import renderer, rendering

FLAGS = flags.FLAGS
_TEMPLATE_BYTES = 2**20
_THINK = '<think>'  # R1's template opens a thought for the model
_NAMES = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')


def define(values: flags.FlagValues = FLAGS) -> None:
  """Defines the flag of every program that chats."""
  text = "A file with a template in Jinja; '' is the model's."
  cli.define_path('chat_template', '', text, values)


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
  rendering.run(text, None, {})
  return text


def prompt(
  folder: pathlib.Path,
  tokenizer: Tokenizer,
  text: str,
  system: str = '',
  own: str = '',
  special: bool = False,
) -> Int[np.ndarray, ' T']:
  """Returns the ids of a chat with one question, ready for the answer, int32.

  Raises:
    ConfigError: as `encode`.
  """
  messages = [('system', system)] if system else []
  messages.append(('user', text))
  return encode(folder, tokenizer, messages, own, special)


def encode(
  folder: pathlib.Path,
  tokenizer: Tokenizer,
  messages: list[tuple[str, str]],
  own: str = '',
  special: bool = False,
) -> Int[np.ndarray, ' T']:
  """Returns the ids of a chat, ready for the next answer, int32.

  Args:
    folder: of the template.
    tokenizer: of the model.
    messages: (role, text) each; roles are system, user and assistant.
    own: a template in the place of the folder's.
    special: the messages' special tokens are meant, too.

  Raises:
    ConfigError: a template that does not run, or a tokenizer without the
      special tokens that it needs.
  """
  return opened(folder, tokenizer, own).prompt(messages, special=special)


class Template(NamedTuple):
  """A model's template, read once for many chats.

  text: in Jinja; '' is that of V3 and R1. names: the texts of bos_token and
  its kin. special: ids of the special tokens, by their text. ends: ids with
  which an answer may end.
  """

  tokenizer: Tokenizer
  text: str
  names: dict[str, str]
  special: dict[str, int]
  ends: set[int]

  def prompt(
    self,
    messages: list[tuple[str, str]],
    continued: bool = False,
    special: bool = False,
  ) -> Int[np.ndarray, ' T']:
    """Returns the ids of a chat as `encode` does.

    With `continued`, they end in the last message, which goes on.
    """
    if continued:
      rendered = self._continued(messages)
    else:
      rendered = self._rendered(messages, True)
    if special:
      rendered = rendered._replace(own=[(0, len(rendered.text))])
    else:
      self._check_traced(rendered, messages)
    return _encode(rendered, self.special, self.tokenizer)

  def opening(self) -> str:
    """Returns '<think>' and the blanks after it if a prompt ends so, or ''."""
    mark = _mark([])
    end = self._rendered([('user', mark)], True).text.rpartition(mark)[2]
    return end[end.rfind(_THINK) :] if end.rstrip().endswith(_THINK) else ''

  def answer(self, messages: list[tuple[str, str]]) -> Int[np.ndarray, ' T']:
    """Returns the ids of the last message, an answer, with its end token.

    They follow those of `prompt(messages[:-1])`. The answer is learned as it
    is, even if the template would cut it (R1's cuts thoughts). If that prompt
    opens a thought already, the answer does not open it again.

    Raises:
      ConfigError: as `encode`, or an answer that does not end in eos.
    """
    role, text = messages[-1]
    opening = self._rendered(messages[:-1], True).text
    if opening.rstrip().endswith(_THINK) and text.lstrip().startswith(_THINK):
      text = text.lstrip().removeprefix(_THINK)
      text = text.removeprefix('\n' if opening.endswith('\n') else '')
    mark = _mark(messages)
    whole = self._rendered([*messages[:-1], (role, mark)], False)
    start = whole.text.rfind(mark)
    if start < 0:
      raise ConfigError('the chat template leaves out an answer')
    start += len(mark)
    ends = (
      token.end()
      for token in re.compile(prompts.any_of(self.special)).finditer(
        whole.text, start
      )
      if whole.has_own(*token.span())
    )
    end = whole.text[start : next(ends, start)]
    own = [(len(text), len(text + end))]
    ids = _encode(
      rendering.Rendered(text + end, own), self.special, self.tokenizer
    )
    eos = self.tokenizer.eos_id
    if end and ids[-1] not in self.ends:
      raise ConfigError(
        f'the chat template ends an answer with token {ids[-1]}, and the model '
        f'stops after {eos}; set config.model.eos_id={ids[-1]}'
      )
    return ids if end else np.append(ids, np.int32(eos))

  def _continued(self, messages: list[tuple[str, str]]) -> rendering.Rendered:
    """Returns the chat up to the end of its last message, as transformers."""
    *earlier, (role, text) = messages
    mark = _mark(messages)
    whole = self._rendered([*earlier, (role, f'{text}{mark} ')], False)
    end = whole.text.rfind(mark)
    if end < 0 or text.strip() not in whole.text:
      raise ConfigError(
        'the chat template leaves out a part of the message to continue'
      )
    text = whole.text[:end]
    if not whole.text.startswith(f'{mark} ', end):  # it trims messages
      text = text.rstrip()
    own = ((a, min(b, len(text))) for a, b in whole.own)
    return rendering.Rendered(text, [(a, b) for a, b in own if a < b])

  def _check_traced(self, rendered: rendering.Rendered, messages) -> None:
    """Refuses a template whose own special tokens cannot be told from texts.

    A special token of which the template wrote nothing is a person's, and
    disappears with the special tokens of all messages.
    """
    pattern = re.compile(prompts.any_of(self.special))
    foreign = lambda rendered: [
      token.group()
      for token in pattern.finditer(rendered.text)
      if rendered.is_own_free(*token.span())
    ]
    if not foreign(rendered):
      return
    blank = lambda token: '.' * len(token.group())
    messages = [(role, pattern.sub(blank, text)) for role, text in messages]
    for token in foreign(self._rendered(messages, True)):
      raise ConfigError(
        f'the chat template makes {token!r} by a way that cannot be told from '
        'a text; write the token into --chat_template=FILE as it is'
      )

  def _rendered(
    self, messages: list[tuple[str, str]], ready: bool
  ) -> rendering.Rendered:
    """Returns the template's text, `ready` for the next answer."""
    if self.text:
      messages = [{'role': role, 'content': text} for role, text in messages]
      values = {'messages': messages, 'add_generation_prompt': ready}
      return rendering.run(self.text, values, self.names)
    for token in (BOS, USER, ASSISTANT):
      if token not in self.special:
        raise ConfigError(
          f'chat: the tokenizer has no token {token!r}, which the template '
          'of V3 and R1 needs; name another one by --chat_template=FILE, or '
          'continue texts without a chat'
        )
    around = {
      'system': ('', ''),
      'user': (USER, ''),
      'assistant': (ASSISTANT, EOS),
    }
    parts = [renderer.own(BOS)]
    for role, text in messages:
      before, after = map(renderer.own, around[role])
      parts += [before, text, after]
    parts.append(renderer.own(ASSISTANT if ready else ''))
    return rendering.Rendered(*renderer.traced(renderer.concat(parts)))


def opened(
  folder: pathlib.Path | None, tokenizer: Tokenizer, own: str = ''
) -> Template:
  """Returns the template `own`, or without one that of the folder.

  Raises:
    ConfigError: the folder's files are broken, or name several templates.
  """
  folder = folder or pathlib.Path(os.devnull)
  special = prompts.special_tokens(tokenizer)
  text_of = {index: text for text, index in special.items()}
  path = folder / 'tokenizer_config.json'
  values = files.read_json(path) if path.exists() else {}
  for name in ('bos', 'eos'):  # a null is a model without such a token
    token = text_of.get(getattr(tokenizer, f'{name}_id'), '')
    values.setdefault(f'{name}_token', token)
  names = {f'{name}_token': values.get(f'{name}_token') for name in _NAMES}
  names = {name: vocabulary.text_of(token) for name, token in names.items()}
  names = {name: text for name, text in names.items() if text}
  return Template(
    tokenizer=tokenizer,
    text=own or _of(folder, values),
    names=names,
    special=special,
    ends={tokenizer.eos_id} | endings.listed(folder),
  )


def _of(folder: pathlib.Path, values: dict) -> str:
  """Returns the template of a folder, '' without one.

  Args:
    folder: with a chat_template.jinja or a chat_template.json, perhaps.
    values: of its tokenizer_config.json.
  """
  file = folder / 'chat_template.jinja'
  if file.exists():
    try:
      return files.read_bytes(file, _TEMPLATE_BYTES).decode('utf-8')
    except UnicodeDecodeError:
      raise ConfigError(f'{file}: is no text in UTF-8') from None
  path = folder / 'tokenizer_config.json'
  template = values.get('chat_template')
  if not template and (folder / 'chat_template.json').exists():
    path = folder / 'chat_template.json'
    template = files.read_json(path).get('chat_template')
  if isinstance(template, list):
    named = {x.get('name'): x for x in template if isinstance(x, dict)}
    if 'default' not in named:
      raise ConfigError(
        f'{path}: none of its chat templates has the name "default"; write one '
        'of them into a file, and name it by --chat_template=FILE'
      )
    template = named['default'].get('template')
  if not isinstance(template or '', str):
    raise ConfigError(f'{path}: chat_template is no text')
  return template or ''


def _mark(messages: list[tuple[str, str]]) -> str:
  """Returns a text that no message has."""
  mark = '\ue000'
  while any(mark in text for _, text in messages):
    mark += '\ue000'
  return mark + '\ue001'


def _encode(
  rendered: rendering.Rendered, special: dict[str, int], tokenizer: Tokenizer
) -> Int[np.ndarray, ' T']:
  """Returns the ids of the template's special tokens, and of the text between
  them."""
  ids: list[int] = []
  start = 0
  for token in re.finditer(prompts.any_of(special), rendered.text):
    if rendered.has_own(*token.span()):
      ids += tokenizer.encode(rendered.text[start : token.start()]).tolist()
      ids.append(special[token.group()])
      start = token.end()
  ids += tokenizer.encode(rendered.text[start:]).tolist()
  return np.array(ids, np.int32)
