"""What a client asks, checked field by field: nothing in it is trusted."""

from __future__ import annotations

import json
import secrets
from typing import NamedTuple

from starlette.requests import Request

from experiments import chat

_KNOBS = {
  'temperature': 1.0,
  'top_p': 1.0,
  'top_k': 0,
  'min_p': 0.0,
  'repetition_penalty': 1.0,
}
_KNOWN = {
  'model', 'prompt', 'messages', 'max_tokens', 'max_completion_tokens', 'n',
  'stop', 'stream', 'stream_options', 'seed', 'logprobs', 'user', *_KNOBS,
}  # fmt: skip
_ROLES = {'system': 'system', 'developer': 'system', 'user': 'user'}
_ROLES['assistant'] = 'assistant'


class Refused(Exception):
  """An answer other than 200."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class Job(NamedTuple):
  """Prompts as token ids, and how each of their samples is to be made."""

  prompts: list
  new: int
  samples: int
  stops: list
  seed: int
  knobs: dict
  stream: bool
  usage: bool
  logprobs: bool


async def body(request: Request, limit: int) -> dict:
  """The JSON object that was sent, of at most `limit` bytes.

  Raises:
    Refused: it is none.
  """
  data = bytearray()
  async for part in request.stream():
    data += part
    if len(data) > limit:
      raise Refused(413, f'the body is longer than {limit} bytes')
  try:
    found = json.loads(bytes(data))
  except (ValueError, RecursionError):
    raise Refused(400, 'the body is no JSON') from None
  if not isinstance(found, dict):
    raise Refused(400, 'the body is no JSON object')
  return found


def job(body: dict, loaded, talking: bool, length: int) -> Job:
  """The checked fields of a request; `talking` is for a chat.

  Raises:
    Refused, ConfigError: what cannot be answered.
  """
  for field, value in body.items():
    if field not in _KNOWN and value not in (None, False, 0, 0.0, {}, []):
      raise Refused(400, f'{field}: is not supported')
  body = {k: v for k, v in body.items() if v is not None}

  def get(field, default, *kinds):
    value = body.get(field, default)
    boolean = isinstance(value, bool) and bool not in kinds
    if boolean or not isinstance(value, kinds):
      raise Refused(400, f'{field}: must be {kinds[0].__name__}')
    return value

  if talking:
    prompts = [_messages(get('messages', [], list), loaded)]
  else:
    prompts = _prompts(body.get('prompt'), loaded)
  longest = max(map(len, prompts))
  new = get('max_tokens', 0 if talking else 16, int)
  new = get('max_completion_tokens', new, int) or max(length - longest, 1)
  stops = get('stop', [], list, str)
  stops = [stops] if isinstance(stops, str) else stops
  if len(stops) > 16 or not all(isinstance(s, str) and s for s in stops):
    raise Refused(400, 'stop: must be up to 16 texts')
  asked = get('logprobs', 0, bool if talking else int, int, bool)
  return Job(
    prompts=prompts,
    new=new,
    samples=get('n', 1, int),
    stops=stops,
    seed=get('seed', secrets.randbits(30), int),
    knobs={
      # A whole default is of a whole number.
      k: get(k, v, int, *([] if isinstance(v, int) else [float]))
      for k, v in _KNOBS.items()
    },
    stream=get('stream', False, bool),
    usage=bool(get('stream_options', {}, dict).get('include_usage')),
    logprobs='logprobs' in body and asked is not False,
  )


def _prompts(given, loaded) -> list:
  """Token ids of one prompt or of several, texts or ids."""
  number = lambda x: isinstance(x, int) and not isinstance(x, bool)
  if isinstance(given, str):
    given = [given]
  if not isinstance(given, list) or not given or len(given) > 64:
    raise Refused(400, 'prompt: must be a text, or up to 64 of them')
  if all(map(number, given)):
    given = [given]
  found = []
  for one in given:
    if isinstance(one, str):
      found.append([loaded.config.bos_id, *loaded.words.encode(one).tolist()])
    elif isinstance(one, list) and one and all(map(number, one)):
      if max(one) >= loaded.config.vocab or min(one) < 0:
        raise Refused(
          400, f'prompt: ids go from 0 to {loaded.config.vocab - 1}'
        )
      found.append(one)
    else:
      raise Refused(400, 'prompt: must be texts or lists of token ids')
  return found


def _messages(given: list, loaded) -> list:
  said = []
  for message in given:
    if not isinstance(message, dict) or message.get('role') not in _ROLES:
      raise Refused(400, f'messages: a role is one of {", ".join(_ROLES)}')
    content = message.get('content')
    if isinstance(content, list):
      parts = [p.get('text') if isinstance(p, dict) else None for p in content]
      good = all(isinstance(part, str) for part in parts)
      content = ''.join(parts) if good else None
    if not isinstance(content, str):
      raise Refused(400, 'messages: a content is a text')
    said.append((_ROLES[message['role']], content))
  if not said:
    raise Refused(400, 'messages: are empty')
  return chat.talk(loaded.folder, loaded.words, said).tolist()
