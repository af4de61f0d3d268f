"""OpenAI's protocol over an engine: completions, chat, models, health.

A request that cannot be served gets OpenAI's error object with one line. A
client that goes away frees its rows (`answer`). Web pages are no clients: a
browser sends their requests to any address, this machine's own included, and
names the page in the header Origin. So requests with an Origin are refused,
unless the server is told to trust it, and those for another Host, which a page
gets by giving its own name this machine's address.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Sequence

from starlette import requests
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mla_moe.config import ConfigError

from ..opened import TextModel
from . import scheduler, validation
from .answer import Answer
from .body import Refused, read_body
from .engine import Engine

_METHODS = 'GET, POST, OPTIONS'


def app(
  engine: Engine,
  model: TextModel,
  name: str,
  body_limit: int = 1 << 20,
  hosts: Sequence[str] = ('127.0.0.1', 'localhost', '[::1]'),
  origins: Sequence[str] = (),
) -> Starlette:
  """Returns the ASGI application that serves `model` under `name`.

  Args:
    engine: of the model's scheduler.
    model: with its tokenizer.
    name: of the model, for clients.
    body_limit: bytes of a request.
    hosts: names that clients may call this machine by; '*' is any.
    origins: web pages that may be clients.
  """

  async def models(_):
    return JSONResponse({'object': 'list', 'data': [_card(engine, name)]})

  async def model_card(http: requests.Request):
    try:
      _check_name(http.path_params['name'], name)
    except Refused as error:
      return _error(error)
    return JSONResponse(_card(engine, name))

  async def health(_):
    if engine.failure:
      return JSONResponse({'status': 'failed'}, status_code=503)
    return JSONResponse({'status': 'ok', **engine.status})

  @contextlib.asynccontextmanager
  async def lifespan(_):
    yield
    await asyncio.to_thread(engine.close)

  completions, chat = '/v1/completions', '/v1/chat/completions'
  handler = functools.partial(
    _handler, engine, model, name, body_limit, origins
  )
  return Starlette(
    routes=[
      Route('/v1/models', models),
      Route('/v1/models/{name:path}', model_card),
      Route(completions, handler(False), methods=['POST']),
      Route(chat, handler(True), methods=['POST']),
      Route('/healthz', health),
      Route(completions, _preflight, methods=['OPTIONS']),
      Route(chat, _preflight, methods=['OPTIONS']),
    ],
    middleware=_layers(hosts, origins),
    exception_handlers={HTTPException: _http_error, Exception: _fault},
    lifespan=lifespan,
  )


def _handler(engine, model, name, body_limit, origins, is_chat):
  """Returns the function that answers completions, or chats."""

  async def handle(http: requests.Request) -> Response:
    try:
      body = await read_body(http, body_limit, origins)
      _check_name(body.get('model'), name)
      # In a thread of its own: it may take long, and others go on.
      request = await asyncio.to_thread(
        validation.parse, body, model, is_chat, engine.length
      )
      answer = Answer(engine, model, name, request, is_chat)
      await answer.submit()
      if request.stream:
        lines = answer.lines()
        return StreamingResponse(lines, media_type='text/event-stream')
      return JSONResponse(await answer.whole(http))
    except Refused as error:
      return _error(error)
    except ConfigError as error:
      return _error(Refused(400, str(error)))
    except scheduler.Full as error:
      return _error(Refused(429, str(error)))
    except RuntimeError as error:  # the engine's
      return _error(Refused(503, str(error)))

  return handle


def _layers(hosts: Sequence[str], origins: Sequence[str]) -> list[Middleware]:
  """Returns the checks of a request's host and of its page."""
  layers = [
    Middleware(_Hosts, allowed_hosts=[*hosts], www_redirect=False),
  ]
  if origins:
    layers.append(
      Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=_METHODS.split(', '),
        allow_headers=['*'],
      )
    )
  return layers


class _Hosts(TrustedHostMiddleware):
  """Refuses other names of this machine; a client of HTTP/1.0 may have none.

  A browser names a host always.
  """

  async def __call__(self, scope, receive, send):
    is_named = any(key == b'host' for key, _ in scope.get('headers', ()))
    answer = super().__call__ if is_named else self.app
    await answer(scope, receive, send)


def _card(engine: Engine, name: str) -> dict:
  """Returns the description of the model; `max_model_len` is vLLM's word."""
  return {
    'id': name,
    'object': 'model',
    'created': 0,
    'owned_by': 'mla_moe',
    'max_model_len': engine.length,
  }


def _check_name(model: object, name: str) -> None:
  """Refuses another model's name; a request may have none."""
  if isinstance(model, str) and model != name:
    shown = repr(model[:80])[1:-1]
    message = f'model={shown!r}: is not served here; this server has {name!r}'
    raise Refused(404, message, 'model', 'model_not_found')


async def _preflight(_) -> Response:
  """Answers a browser's question before a request: it names the methods.

  No header lets a page in; CORSMiddleware answers for those that may enter.
  """
  return Response(headers={'allow': _METHODS})


async def _http_error(_, error: HTTPException) -> JSONResponse:
  """Answers a wrong path or method."""
  out = _error(Refused(error.status_code, str(error.detail)))
  out.headers.update(error.headers or {})
  return out


async def _fault(_, error: Exception) -> JSONResponse:
  """Answers after an error of the server's own, which the log has."""
  return _error(Refused(500, f'{type(error).__name__}: the log has more'))


def _error(error: Refused) -> JSONResponse:
  status = error.status
  kind = 'invalid_request_error' if status < 429 else 'server_error'
  kind = 'rate_limit_error' if status == 429 else kind
  value = {
    'message': str(error),
    'type': kind,
    'param': error.field or None,
    'code': error.code or None,
  }
  headers = {'retry-after': '1'} if status == 429 else None
  return JSONResponse({'error': value}, status_code=status, headers=headers)
