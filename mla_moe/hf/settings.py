"""The settings beside exported weights, where the model had none of its own.

transformers and vLLM read which tokens begin and end a text from
tokenizer_config.json and generation_config.json, and how a chat is spelled from
the first. The chat template is that of V3 and R1.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mla_moe import files, vocabulary
from mla_moe.config import ModelConfig
from mla_moe.vocabulary import Vocabulary

PAD, USER, ASSISTANT = '<｜▁pad▁｜>', '<｜User｜>', '<｜Assistant｜>'
TEMPLATE = (
  '{{ bos_token }}{% for m in messages %}'
  "{% if m['role'] == 'user' %}{{ '" + USER + "' + m['content'] }}"
  "{% elif m['role'] == 'assistant' %}"
  "{{ '" + ASSISTANT + "' + m['content'] + eos_token }}"
  "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def completed(
  config: ModelConfig, extras: Mapping[str, pathlib.Path | bytes]
) -> dict[str, pathlib.Path | bytes]:
  """Returns `extras` with the settings that they lack.

  A tokenizer.json without settings also gets its bos (`with_bos`).

  Args:
    config: of the model. Its ids may be -1: nothing is said of such a token.
    extras: {name: file or content} of the other files beside the weights.

  Raises:
    ConfigError: the tokenizer.json is none.
  """
  out, wanted = dict(extras), {}
  if {'tokenizer_config.json', 'generation_config.json'} <= out.keys():
    return out
  ends = {'bos_token_id': config.bos_id, 'eos_token_id': config.eos_id}
  if 'tokenizer.json' in extras:
    content, name = extras['tokenizer.json'], 'tokenizer.json'
    if isinstance(content, pathlib.Path):
      content, name = files.read_bytes(content), str(content)
    words = vocabulary.parse(content, name, {})
    pad = {text: index for index, text in words.special.items()}.get(PAD, -1)
    ends['pad_token_id'] = pad if pad >= 0 else config.eos_id
    wanted['tokenizer_config.json'] = _tokenizer_config(config, words, ends)
    bos = words.special.get(config.bos_id)
    if 'tokenizer_config.json' not in extras and bos:
      out['tokenizer.json'] = with_bos(content, config.bos_id, bos)
  ends = {name: index for name, index in ends.items() if index >= 0}
  wanted |= {'generation_config.json': ends} if ends else {}
  for name, values in wanted.items():
    text = json.dumps(values, indent=2, ensure_ascii=False)
    out.setdefault(name, f'{text}\n'.encode())
  return out


def with_bos(content: bytes, bos_id: int, bos: str) -> bytes:
  """Returns a tokenizer.json with which other programs begin a text with bos.

  They look at its post_processor alone (transformers 5 drops `add_bos_token`).
  One that adds tokens already is left as it is.
  """
  values = json.loads(content)
  old = values.get('post_processor')
  if old and old.get('type') != 'ByteLevel':
    return content
  part = lambda name, kind: {'Sequence': {'id': name, 'type_id': kind}}
  first = [{'SpecialToken': {'id': bos, 'type_id': 0}}, part('A', 0)]
  template = {
    'type': 'TemplateProcessing',
    'single': first,
    'pair': [*first, part('B', 1)],
    'special_tokens': {bos: {'id': bos, 'ids': [bos_id], 'tokens': [bos]}},
  }
  both = {'type': 'Sequence', 'processors': [old, template]}
  values['post_processor'] = both if old else template
  return json.dumps(values, indent=1, ensure_ascii=False).encode()


def _tokenizer_config(
  config: ModelConfig, words: Vocabulary, ends: dict[str, int]
) -> dict[str, Any]:
  values = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'add_bos_token': True,
    'add_eos_token': False,
    'clean_up_tokenization_spaces': False,
    'model_max_length': config.max_positions,
  }
  for name, index in ends.items():
    if index in words.special:
      values[name.removesuffix('_id')] = words.special[index]
  if {USER, ASSISTANT} <= set(words.special.values()):
    values['chat_template'] = TEMPLATE
  return values
