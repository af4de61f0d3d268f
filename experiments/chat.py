"""A user's words as the tokens of a chat: the model's template, as ids.

The template is that of the folder's tokenizer_config.json (or
chat_template.jinja), run by jinja2 in its sandbox, or else the one of DeepSeek
V3 and R1: bos, the system's text, <｜User｜> text, <｜Assistant｜>. What a
person writes never becomes a special token: the template is given a mark in its
place, and only the template's own text is searched for them.
"""

from __future__ import annotations

import pathlib
import re

import numpy as np

from mla_moe.config import ConfigError
from mla_moe.data import tokenizer
from mla_moe.hf import config_json

USER, ASSISTANT = '<｜User｜>', '<｜Assistant｜>'
_MARK = re.compile('\ue000([0-9]+)\ue001')


def prompt(
  folder: pathlib.Path, words: tokenizer.Tokenizer, text: str, system: str = ''
) -> np.ndarray:
  """Ids of a chat with one question, ready for the answer, int32.

  Raises:
    ConfigError: as `talk`.
  """
  messages = [('system', system)] if system else []
  return talk(folder, words, [*messages, ('user', text)])


def talk(
  folder: pathlib.Path,
  words: tokenizer.Tokenizer,
  messages: list[tuple[str, str]],
) -> np.ndarray:
  """Ids of a chat, (role, text) each, ready for the next answer, int32.

  Raises:
    ConfigError: a template that does not run, or a tokenizer without the
      special tokens that it needs.
  """
  marked = [
    {'role': role, 'content': f'\ue000{i}\ue001'}
    for i, (role, _) in enumerate(messages)
  ]
  settings = _settings(folder)
  template = settings['template']
  special = _special(words)
  if template:
    rendered = _render(template, marked, settings)
  else:
    for token in (tokenizer.BOS, USER, ASSISTANT):
      if token not in special:
        raise ConfigError(
          f'--chat: the tokenizer has no token {token!r}, which the template '
          'of V3 and R1 needs; continue texts with it, without --chat'
        )
    around = {
      'system': '{}',
      'user': USER + '{}',
      'assistant': ASSISTANT + '{}' + tokenizer.EOS,
    }
    said = (around[m['role']].format(m['content']) for m in marked)
    rendered = tokenizer.BOS + ''.join(said) + ASSISTANT
  return _encode(rendered, [text for _, text in messages], special, words)


def _settings(folder: pathlib.Path) -> dict:
  """The template ('' if there is none) and the texts of bos and eos."""
  path = folder / 'tokenizer_config.json'
  values = config_json.read_json(path) if path.exists() else {}
  template = values.get('chat_template') or ''
  if isinstance(template, list):  # several, by name
    named = {x.get('name'): x.get('template') for x in template}
    template = named.get('default') or ''
  alone = folder / 'chat_template.jinja'
  if alone.exists():
    template = alone.read_text(encoding='utf-8')
  content = lambda t: t.get('content') if isinstance(t, dict) else t
  return {
    'template': template,
    'bos_token': content(values.get('bos_token')) or tokenizer.BOS,
    'eos_token': content(values.get('eos_token')) or tokenizer.EOS,
  }


def _render(template: str, messages: list[dict], settings: dict) -> str:
  try:
    from jinja2 import exceptions, sandbox
  except ImportError:
    raise ConfigError(
      'a chat template needs jinja2: pip install "mla_moe[hf]"'
    ) from None

  def refuse(message):
    raise exceptions.TemplateError(message)

  world = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True
  )
  world.globals['raise_exception'] = refuse
  try:
    return world.from_string(template).render(
      messages=messages,
      add_generation_prompt=True,
      bos_token=settings['bos_token'],
      eos_token=settings['eos_token'],
    )
  except (exceptions.TemplateError, TypeError, ValueError) as error:
    raise ConfigError(f'--chat: the chat template fails ({error})') from None


def _special(words: tokenizer.Tokenizer) -> dict[str, int]:
  """The added tokens of a tokenizer, by their text."""
  core = getattr(words, 'core', None)
  if core is None:
    return {}
  added = core.get_added_tokens_decoder()
  return {token.content: index for index, token in added.items()}


def _encode(rendered, texts, special, words) -> np.ndarray:
  """Ids: special tokens of the template, and text between them as text."""
  ids: list[int] = []
  plain = ''

  def flush():
    nonlocal plain
    ids.extend(words.encode(plain).tolist())
    plain = ''

  names = sorted(map(re.escape, special), key=len, reverse=True)
  pieces = '|'.join([*names, _MARK.pattern])
  at = 0
  for found in re.finditer(pieces, rendered):
    plain += rendered[at : found.start()]
    at = found.end()
    if found.group(1) is not None:
      plain += texts[int(found.group(1))]
      continue
    flush()
    ids.append(special[found.group()])
  plain += rendered[at:]
  flush()
  return np.array(ids, np.int32)
