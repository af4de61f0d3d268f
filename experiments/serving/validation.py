"""A client's request, checked field by field: nothing in it is trusted.

Whatever costs time or memory is bounded here, before anything is made of it:
the body's bytes, the samples, the stop texts, and the size of every number.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import NamedTuple

from starlette import requests

from ..opened import TextModel
from . import template

_KNOBS = {
  'temperature': 1.0,
  'top_p': 1.0,
  'top_k': 0,
  'min_p': 0.0,
  'repetition_penalty': 1.0,
}
_FIELDS = {
  'model', 'prompt', 'messages', 'max_tokens', 'max_completion_tokens', 'n',
  'stop', 'stream', 'stream_options', 'seed', 'logprobs', 'user', *_KNOBS,
}  # fmt: skip
_SAMPLES = 1024  # most of a request, over all its prompts
_STOPS, _STOP_LENGTH = 16, 256
_BODY_SECONDS = 60
_LARGEST = 2**64  # of every number
_ROLES = {
  'system': 'system',
  'developer': 'system',
  'user': 'user',
  'assistant': 'assistant',
}


class Refused(Exception):
  """An answer of another status than 200."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class Request(NamedTuple):
  """A request for completions or for a chat.

  prompts: token ids; samples: of each prompt; stops: texts that end a sample;
  knobs: of `sampling.make_knobs`; stream: send tokens as they come; usage: send
  the counts of tokens at the end of a stream; logprobs: send log-probabilities.
  """

  prompts: list[list[int]]
  max_new_tokens: int
  samples: int
  stops: list[str]
  seed: int
  knobs: dict
  stream: bool
  usage: bool
  logprobs: bool


async def read_body(request: requests.Request, limit: int) -> dict:
  """Returns the JSON object of a request's body.

  Raises:
    Refused: the body is none, has more than `limit` bytes, does not come, or
      comes from a web page.
  """
  if 'origin' in request.headers:
    raise Refused(403, 'origin: requests of web pages are not answered')
  kind = request.headers.get('content-type', '').split(';')[0].strip().lower()
  if kind != 'application/json':  # pages may send any text without asking
    raise Refused(
      415, f'content-type: is {kind[:80]!r}, must be application/json'
    )
  data = bytearray()
  try:
    async with asyncio.timeout(_BODY_SECONDS):
      async for part in request.stream():
        data += part
        if len(data) > limit:
          raise Refused(413, f'the body is longer than {limit} bytes')
  except TimeoutError:
    raise Refused(
      408, f'the body has not come within {_BODY_SECONDS} seconds'
    ) from None
  try:
    body = json.loads(bytes(data))
  except (ValueError, RecursionError):
    raise Refused(400, 'the body is no JSON') from None
  if not isinstance(body, dict):
    raise Refused(400, 'the body is no JSON object')
  return body


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
  for field, value in body.items():
    if field not in _FIELDS and value not in (None, False, 0, 0.0, {}, []):
      raise Refused(400, f'{field[:80]!r}: is not supported')
  body = {k: v for k, v in body.items() if v is not None}

  def get(field, default, *kinds):
    value = body.get(field, default)
    boolean = isinstance(value, bool) and bool not in kinds
    if boolean or not isinstance(value, kinds):
      raise Refused(400, f'{field}: must be {kinds[0].__name__}')
    if isinstance(value, (int, float)) and not abs(value) < _LARGEST:
      raise Refused(400, f'{field}: must be a number below 2**64')
    return value

  if is_chat:
    prompts = [_chat_ids(get('messages', [], list), model)]
  else:
    prompts = _prompts_ids(body.get('prompt'), model)
  longest = max(map(len, prompts))
  limit = get('max_tokens', 0 if is_chat else 16, int)
  limit = get('max_completion_tokens', limit, int) or max(length - longest, 1)
  logprobs = get('logprobs', 0, bool if is_chat else int, int, bool)
  return Request(
    prompts=prompts,
    max_new_tokens=limit,
    samples=_samples(get('n', 1, int), len(prompts)),
    stops=_stops(get('stop', [], list, str)),
    seed=get('seed', secrets.randbits(30), int) % 2**31,
    knobs={
      # A default of type int allows no float.
      k: get(k, v, int, *([] if isinstance(v, int) else [float]))
      for k, v in _KNOBS.items()
    },
    stream=get('stream', False, bool),
    usage=bool(get('stream_options', {}, dict).get('include_usage')),
    logprobs='logprobs' in body and logprobs is not False,
  )


def _samples(n: int, prompts: int) -> int:
  """Returns the number of samples of each prompt, which is bounded."""
  most = _SAMPLES // prompts
  if not 1 <= n <= most:
    raise Refused(
      400,
      f'n={n}: must be from 1 to {most} samples; those of all prompts together '
      f'are at most {_SAMPLES}',
    )
  return n


def _stops(stops: list | str) -> list[str]:
  """Returns the texts that end a sample; there are few, and none is long."""
  stops = [stops] if isinstance(stops, str) else stops
  is_good = lambda s: isinstance(s, str) and 0 < len(s) <= _STOP_LENGTH
  if len(stops) > _STOPS or not all(map(is_good, stops)):
    raise Refused(
      400,
      f'stop: must be up to {_STOPS} texts of 1 to {_STOP_LENGTH} characters',
    )
  return stops


def _prompts_ids(prompt, model: TextModel) -> list[list[int]]:
  """Returns the ids of one prompt or of several; each is a text, or ids."""
  number = lambda x: isinstance(x, int) and not isinstance(x, bool)
  if isinstance(prompt, str):
    prompt = [prompt]
  if not isinstance(prompt, list) or not prompt or len(prompt) > 64:
    raise Refused(400, 'prompt: must be a text, or up to 64 of them')
  if all(map(number, prompt)):
    prompt = [prompt]
  prompts = []
  for one in prompt:
    if isinstance(one, str):
      prompts.append(
        [model.config.bos_id, *model.tokenizer.encode(one).tolist()]
      )
    elif isinstance(one, list) and one and all(map(number, one)):
      if max(one) >= model.config.vocab or min(one) < 0:
        raise Refused(400, f'prompt: ids go from 0 to {model.config.vocab - 1}')
      prompts.append(one)
    else:
      raise Refused(400, 'prompt: must be texts or lists of token ids')
  return prompts


def _chat_ids(messages: list, model: TextModel) -> list[int]:
  """Returns the ids of a chat, ready for the next answer."""
  checked = []
  for message in messages:
    if not isinstance(message, dict) or message.get('role') not in [*_ROLES]:
      raise Refused(400, f'messages: a role is one of {", ".join(_ROLES)}')
    content = message.get('content')
    if isinstance(content, list):
      parts = [p.get('text') if isinstance(p, dict) else None for p in content]
      good = all(isinstance(part, str) for part in parts)
      content = ''.join(parts) if good else None
    if not isinstance(content, str):
      raise Refused(400, 'messages: a content is a text')
    checked.append((_ROLES[message['role']], content))
  if not checked:
    raise Refused(400, 'messages: are empty')
  ids = template.encode(model.folder, model.tokenizer, checked, model.template)
  return ids.tolist()
