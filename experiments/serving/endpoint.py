"""OpenAI's protocol over an engine: completions, chat, models, health.

A request that cannot be served gets OpenAI's error object with one line. A
client that goes away frees its rows. Web pages are no clients: a browser sends
their requests to any address, this machine's own included, and names the page
in the header Origin. So requests with an Origin are refused, and those for
another Host, which a page gets by giving its own name this machine's address.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Sequence

from starlette import requests
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from mla_moe.config import ConfigError

from .. import text
from ..opened import TextModel
from . import scheduler, validation
from .engine import Engine


def app(
  engine: Engine,
  model: TextModel,
  name: str,
  body_limit: int = 1 << 20,
  hosts: Sequence[str] = ('127.0.0.1', 'localhost', '[::1]'),
) -> Starlette:
  """Returns the ASGI application that serves `model` under `name`.

  Args:
    engine: of the model's scheduler.
    model: with its tokenizer.
    name: of the model, for clients.
    body_limit: bytes of a request.
    hosts: names that clients may call this machine by; '*' is any.
  """

  async def models(_):
    card = {'id': name, 'object': 'model', 'created': 0, 'owned_by': 'mla_moe'}
    return JSONResponse({'object': 'list', 'data': [card]})

  async def health(_):
    if engine.failure:
      return JSONResponse({'status': 'failed'}, status_code=503)
    return JSONResponse({'status': 'ok', **engine.status})

  def handler(is_chat: bool):
    async def handle(http: requests.Request):
      try:
        body = await validation.read_body(http, body_limit)
        # In a thread of its own: it may take long, and others go on.
        request = await asyncio.to_thread(
          validation.parse, body, model, is_chat, engine.length
        )
        answer = _Answer(engine, model, name, request, is_chat)
        await answer.submit()
        if request.stream:
          lines = answer.lines()
          return StreamingResponse(lines, media_type='text/event-stream')
        return JSONResponse(await answer.whole(http))
      except validation.Refused as error:
        return _error(error.status, str(error))
      except ConfigError as error:
        return _error(400, str(error))
      except scheduler.Full as error:
        return _error(429, str(error))
      except RuntimeError as error:  # the engine's
        return _error(503, str(error))

    return handle

  @contextlib.asynccontextmanager
  async def lifespan(_):
    yield
    await asyncio.to_thread(engine.close)

  return Starlette(
    routes=[
      Route('/v1/models', models),
      Route('/v1/completions', handler(False), methods=['POST']),
      Route('/v1/chat/completions', handler(True), methods=['POST']),
      Route('/healthz', health),
    ],
    middleware=[
      Middleware(
        TrustedHostMiddleware, allowed_hosts=[*hosts], www_redirect=False
      )
    ],
    lifespan=lifespan,
  )


def _error(status: int, message: str) -> JSONResponse:
  kind = 'invalid_request_error' if status < 429 else 'server_error'
  kind = 'rate_limit_error' if status == 429 else kind
  error = {'message': message, 'type': kind, 'param': None, 'code': None}
  headers = {'retry-after': '1'} if status == 429 else None
  return JSONResponse({'error': error}, status_code=status, headers=headers)


class _Answer:
  """The answer to one request, while its samples come.

  Choice i is sample `i % samples` of prompt `i // samples`.
  """

  def __init__(self, engine, model, name, request, is_chat: bool):
    self._engine, self._model, self._request = engine, model, request
    self._is_chat = is_chat
    self._tickets, self._events = [], asyncio.Queue()
    total = len(request.prompts) * request.samples
    self._texts = [
      text.TextStream(model.tokenizer, request.stops) for _ in range(total)
    ]
    self._open = set(range(total))
    self._tokens = 0
    kind = 'chat.completion' if is_chat else 'text_completion'
    prefix = 'chatcmpl' if is_chat else 'cmpl'
    self._head = {
      'id': f'{prefix}-{secrets.token_hex(12)}',
      'object': kind + ('.chunk' if is_chat and request.stream else ''),
      'created': int(time.time()),
      'model': name,
    }

  async def submit(self) -> None:
    """Submits every prompt, or none."""
    request = self._request
    self._tickets, self._events = await self._engine.submit(
      request.prompts,
      request.max_new_tokens,
      samples=request.samples,
      stop_ids=self._model.stop_ids,
      seed=request.seed,
      **request.knobs,
    )

  async def whole(self, http: requests.Request) -> dict:
    """Returns the answer in one piece."""
    total = len(self._texts)
    texts, reasons = [''] * total, [None] * total
    events = [[] for _ in range(total)]
    async for i, piece, event, reason in self._pieces(http):
      texts[i] += piece
      reasons[i] = reason or None
      events[i].append(event)
    choices = [
      self._choice(i, *parts, key='message')
      for i, parts in enumerate(zip(texts, reasons, events, strict=True))
    ]
    return {**self._head, 'choices': choices, 'usage': self._usage()}

  async def lines(self):
    """Yields the answer as server-sent events."""
    line = lambda value: f'data: {json.dumps(value, ensure_ascii=False)}\n\n'
    try:
      async for i, piece, event, reason in self._pieces():
        choice = self._choice(i, piece, reason or None, [event], key='delta')
        yield line({**self._head, 'choices': [choice]})
    except validation.Refused as error:
      yield line({'error': {'message': str(error), 'type': 'server_error'}})
    if self._request.usage:
      yield line({**self._head, 'choices': [], 'usage': self._usage()})
    yield 'data: [DONE]\n\n'

  async def _pieces(self, http: requests.Request | None = None):
    """Yields (sample, new text, Event, reason) until all samples have ended.

    It ends early when the client of `http` has gone.
    """
    try:
      while self._open:
        try:
          message = await asyncio.wait_for(self._events.get(), 0.5)
        except TimeoutError:
          message = ()
        if http and await http.is_disconnected():
          return
        if message is None:
          raise validation.Refused(500, 'the engine has failed')
        if message and message[0] in self._open:
          yield self._piece(*message)
    finally:  # frees the rows of samples that still run
      self._engine.cancel(self._tickets)

  def _piece(self, i: int, event: scheduler.Event) -> tuple:
    """Returns the piece of one event, in the form that `_pieces` yields."""
    stream, reason = self._texts[i], event.reason
    if reason == 'broken':
      raise validation.Refused(500, "the model's logits are not finite")
    self._tokens += 1
    ids = [] if reason == 'stop' else [event.token]
    piece = stream.add(ids, last=bool(reason))
    if stream.ended:  # perhaps by its last token, too
      if not reason:
        self._engine.cancel([event.ticket])
      reason = 'stop'
    if reason:
      self._open.discard(i)
    return i, piece, event, reason

  def _choice(self, i, piece, reason, events, key) -> dict:
    """Returns a sample's part of the answer; `key` is that of a chat's text."""
    choice = {'index': i, 'finish_reason': reason, 'logprobs': None}
    tokens = [self._model.tokenizer.decode([e.token]) for e in events]
    log_probs = [e.log_prob for e in events]
    if self._is_chat:
      choice[key] = {'role': 'assistant', 'content': piece}
      if self._request.logprobs:
        choice['logprobs'] = {
          'content': [
            {'token': t, 'logprob': p, 'bytes': None, 'top_logprobs': []}
            for t, p in zip(tokens, log_probs, strict=True)
          ]
        }
    else:
      choice['text'] = piece
      if self._request.logprobs:
        choice['logprobs'] = {'tokens': tokens, 'token_logprobs': log_probs}
    return choice

  def _usage(self) -> dict:
    prompt_tokens = sum(map(len, self._request.prompts))
    return {
      'prompt_tokens': prompt_tokens,
      'completion_tokens': self._tokens,
      'total_tokens': prompt_tokens + self._tokens,
    }
