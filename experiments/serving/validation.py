"""A client's request, checked field by field: nothing in it is trusted.

Whatever costs time or memory is bounded here, before anything is made of it:
the samples, the stop texts, and the size of every number. Each value gets the
type of its use here, once. `fields` has the names of all fields, and `body` the
reading of a value.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

from mla_moe.decode import sampling

from .. import prompt
from ..opened import TextModel
from . import fields, template
from .body import Fields, Refused, wrong

_PROMPTS = 64  # most of a request
_SAMPLES = 1024  # over all its prompts
_STOPS, _STOP_LENGTH = 16, 256
_ALTERNATIVES = 20  # most of a token
_ROLES = {
  'system': 'system',
  'developer': 'system',
  'user': 'user',
  'assistant': 'assistant',
}


class Request(NamedTuple):
  """A request for completions or for a chat.

  prompts: token ids; samples: drawn of each prompt; choices: the number of
  those in the answer, the likeliest; stops: texts that end a sample; stop_ids:
  tokens that do, beside the model's unless ignore_eos; knobs: of
  `sampling.make_knobs`; stream: send tokens as they come; usage: send the
  numbers of tokens at the end of a stream; logprobs, prompt_logprobs: send
  log-probabilities and so many alternatives of the answer's tokens and of the
  prompt's, -1: none; echo: begin the answer with the prompt; as_ids: name
  tokens by their ids.
  """

  prompts: list[list[int]]
  max_new_tokens: int
  samples: int
  choices: int
  stops: list[str]
  stop_ids: tuple[int, ...]
  ignore_eos: bool
  seed: int
  knobs: dict
  stream: bool
  usage: bool
  logprobs: int
  prompt_logprobs: int
  echo: bool
  as_ids: bool


def parse(body: dict, model: TextModel, is_chat: bool, length: int) -> Request:
  """Returns the checked fields of a body.

  Args:
    body: of `read_body`.
    model: its tokenizer, template and vocabulary.
    is_chat: whether the body has `messages` or a `prompt`.
    length: most tokens of a prompt and its answer.

  Raises:
    Refused, ConfigError: a request that cannot be answered.
  """
  obeyed = fields.BOTH | (fields.CHAT if is_chat else fields.COMPLETIONS)
  for field, value in body.items():
    if field not in obeyed and not fields.changes_nothing(field, value):
      raise wrong(field, value, 'is not supported')
  get = Fields(body)
  get.text('model')
  if is_chat:
    prompts = [_chat_ids(body.get('messages'), model)]
  else:
    prompts = _prompts_ids(body, get, model)
  samples, choices = _samples(get, len(prompts))
  logprobs, prompt_logprobs = _log_probs(get, is_chat)
  request = Request(
    prompts=prompts,
    max_new_tokens=_limit(get, is_chat, max(map(len, prompts)), length),
    samples=samples,
    choices=choices,
    stops=_stops(body.get('stop')),
    stop_ids=_ids('stop_token_ids', body.get('stop_token_ids') or [], model),
    ignore_eos=get.flag('ignore_eos'),
    # All seeds of the samples that follow wrap around, too.
    seed=get.integer('seed', secrets.randbits(30)) % 2**31,
    knobs=_knobs(get),
    stream=get.flag('stream'),
    usage=_usage(get),
    logprobs=logprobs,
    prompt_logprobs=prompt_logprobs,
    echo=get.flag('echo'),
    as_ids=get.flag('return_tokens_as_token_ids'),
  )
  if request.stream and samples > choices:
    raise wrong('best_of', samples, 'cannot be streamed; set n as high')
  if request.stream and prompt_logprobs >= 0:
    raise wrong('prompt_logprobs', prompt_logprobs, 'cannot be streamed')
  return request


def _knobs(get: Fields) -> dict:
  """Returns the sampling parameters, which the sampler has checked."""
  knobs = {}
  for name, default in fields.KNOBS.items():
    # A default of type int allows no fraction.
    read = get.integer if isinstance(default, int) else get.real
    knobs[name] = read(name, default)
  if knobs['top_k'] == -1:  # vLLM's word for "off"
    knobs['top_k'] = 0
  sampling.make_knobs(1, seed=0, **knobs)
  return knobs


def _limit(get: Fields, is_chat: bool, prompt_tokens: int, length: int) -> int:
  """Returns the most tokens of an answer, which fit behind the prompt."""
  rest = length - prompt_tokens
  default = max(rest, 1) if is_chat else min(16, max(rest, 1))
  limit = get.integer('max_tokens', default, 0)
  limit = get.integer('max_completion_tokens', limit, 0)
  if limit > rest:
    field = 'max_tokens' if rest > 0 else 'messages' if is_chat else 'prompt'
    raise Refused(
      400,
      f"{field}: this model's maximum context length is {length} tokens; the "
      f'prompt has {prompt_tokens}, and the answer may have {limit}',
      field,
      'context_length_exceeded',
    )
  return limit


def _usage(get: Fields) -> bool:
  """Returns whether a stream ends with the numbers of tokens."""
  options = get.table('stream_options')
  for name, value in options.items():
    if name != 'include_usage' and value not in (None, False):
      raise wrong('stream_options', {name: value}, 'is not supported')
  if options and not get.flag('stream'):
    raise wrong('stream_options', options, 'needs stream=true')
  return Fields(options).flag('include_usage')


def _samples(get: Fields, prompts: int) -> tuple[int, int]:
  """Returns how many samples of each prompt are drawn, and answered.

  The number of all of them is bounded.
  """
  most = _SAMPLES // prompts
  n = get.integer('n', 1)
  best_of = get.integer('best_of', n)
  for field, value in (('n', n), ('best_of', best_of)):
    if not 1 <= value <= most:
      raise Refused(
        400,
        f'{field}={value}: must be from 1 to {most} samples; those of all '
        f'prompts together are at most {_SAMPLES}',
        field,
      )
  if best_of < n:
    raise wrong('best_of', best_of, f'must be at least n={n}')
  return best_of, n


def _log_probs(get: Fields, is_chat: bool) -> tuple[int, int]:
  """Returns the alternatives of the answer's tokens and of the prompt's; -1 is
  no log-probability at all."""
  if is_chat:
    logprobs = get.integer('top_logprobs', 0, 0, _ALTERNATIVES)
    if not get.flag('logprobs'):
      if logprobs:
        raise wrong('top_logprobs', logprobs, 'needs logprobs=true')
      logprobs = -1
  elif get.value('logprobs', None) is False:
    logprobs = -1
  elif get.value('logprobs', None) is True:
    logprobs = 1
  else:
    logprobs = get.integer('logprobs', -1, 0, _ALTERNATIVES)
  return logprobs, get.integer('prompt_logprobs', -1, 0, _ALTERNATIVES)


def _stops(stops: list | str | None) -> list[str]:
  """Returns the texts that end a sample; there are few, and none is long."""
  stops = [stops] if isinstance(stops, str) and stops else stops or []
  is_good = lambda s: isinstance(s, str) and 0 < len(s) <= _STOP_LENGTH
  is_list = isinstance(stops, list) and len(stops) <= _STOPS
  if not is_list or not all(map(is_good, stops)):
    rule = f'must be up to {_STOPS} texts of 1 to {_STOP_LENGTH} characters'
    raise wrong('stop', stops, rule)
  return stops


def _is_id(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _ids(field: str, values: object, model: TextModel) -> tuple[int, ...]:
  """Returns a list of token ids, which the model has."""
  last = model.config.vocab - 1
  if not isinstance(values, list) or not all(map(_is_id, values)):
    raise wrong(field, values, 'must be a list of token ids')
  for value in values:
    if not 0 <= value <= last:
      raise wrong(field, value, f'ids go from 0 to {last}')
  return tuple(values)


def _prompts_ids(body: dict, get: Fields, model: TextModel) -> list[list[int]]:
  """Returns the ids of one prompt or of several; each is a text, or ids."""
  if 'prompt' not in body:
    raise Refused(400, 'prompt: is missing', 'prompt')
  value = '' if body['prompt'] is None else body['prompt']
  is_one = isinstance(value, str)
  is_one = is_one or isinstance(value, list) and all(map(_is_id, value))
  prompts = [value] if is_one else value
  if not isinstance(prompts, list) or not 0 < len(prompts) <= _PROMPTS:
    rule = f'must be a text or a list of ids, or up to {_PROMPTS} of them'
    raise wrong('prompt', value, rule)
  suffix, has_bos = get.text('suffix'), get.flag('add_special_tokens', True)
  if suffix and (get.flag('echo') or not has_bos):
    raise wrong('suffix', suffix, 'goes with neither echo nor bare texts')
  ids = []
  for one in prompts:
    is_text = isinstance(one, str)
    if suffix and not is_text:
      raise wrong('suffix', suffix, 'needs a prompt that is a text')
    if not is_text:
      ids.append(list(_ids('prompt', one, model)))
    elif suffix:
      ids.append(prompt.fill_in(model.tokenizer, one, suffix).tolist())
      if max(ids[-1]) >= model.config.vocab:
        raise wrong('suffix', suffix, 'the model has no tokens for it')
    else:
      own = model.tokenizer.encode(one).tolist()
      ids.append([model.config.bos_id] * has_bos + own)
    if not ids[-1]:
      raise wrong('prompt', one, 'has no token')
  return ids


def _chat_ids(messages: object, model: TextModel) -> list[int]:
  """Returns the ids of a chat, ready for the next answer."""
  if not isinstance(messages, list) or not messages:
    raise wrong('messages', messages, 'must be a list of messages')
  checked = []
  for i, message in enumerate(messages):
    field = f'messages[{i}]'
    if not isinstance(message, dict):
      raise wrong(field, message, 'must have a role and a content')
    role = message.get('role')
    if not isinstance(role, str) or role not in _ROLES:
      raise wrong(f'{field}.role', role, f'is one of {", ".join(_ROLES)}')
    for name, value in message.items():
      if name not in ('role', 'content', 'name') and value:
        raise wrong(f'{field}.{name}', value, 'is not supported')
    checked.append((_ROLES[role], _content(field, message.get('content'))))
  ids = template.encode(model.folder, model.tokenizer, checked, model.template)
  return ids.tolist()


def _content(field: str, content: object) -> str:
  """Returns a message's text, which may come in parts."""
  parts = content if isinstance(content, list) else [content]
  texts = []
  for part in parts:
    if isinstance(part, dict) and part.get('type', 'text') != 'text':
      kind = part.get('type')
      raise wrong(f'{field}.content', kind, 'a content is a text')
    text = part.get('text') if isinstance(part, dict) else part
    if not isinstance(text, str):
      raise wrong(f'{field}.content', part, 'a content is a text')
    texts.append(text)
  return ''.join(texts)
