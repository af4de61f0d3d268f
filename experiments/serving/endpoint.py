"""OpenAI's protocol over an engine: completions, chat, models, health.

What cannot be served is said in one line with OpenAI's error object. A client
that goes away frees its rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from experiments import text
from experiments.serving import scheduler, validation
from experiments.serving.engine import Engine
from mla_moe.config import ConfigError


def app(engine: Engine, loaded, name: str, body_limit: int = 1 << 20):
  """The ASGI application; `loaded` is `generate.Loaded`, `name` the model's."""

  async def models(_):
    card = {'id': name, 'object': 'model', 'created': 0, 'owned_by': 'mla_moe'}
    return JSONResponse({'object': 'list', 'data': [card]})

  async def health(_):
    if engine.failure:
      return JSONResponse({'status': 'failed'}, status_code=503)
    return JSONResponse({'status': 'ok', **engine.rows})

  def answering(talking: bool):
    async def answer(request: Request):
      try:
        body = await validation.body(request, body_limit)
        job = validation.job(body, loaded, talking, engine.length)
        run = _Answer(engine, loaded, name, job, talking)
        await run.begin()
        if job.stream:
          return StreamingResponse(run.lines(), media_type='text/event-stream')
        return JSONResponse(await run.whole(request))
      except validation.Refused as error:
        return _error(error.status, str(error))
      except ConfigError as error:
        return _error(400, str(error))
      except scheduler.Full as error:
        return _error(429, str(error))
      except RuntimeError as error:  # the engine's
        return _error(503, str(error))

    return answer

  @contextlib.asynccontextmanager
  async def life(_):
    yield
    await asyncio.to_thread(engine.close)

  return Starlette(
    routes=[
      Route('/v1/models', models),
      Route('/v1/completions', answering(False), methods=['POST']),
      Route('/v1/chat/completions', answering(True), methods=['POST']),
      Route('/healthz', health),
    ],
    lifespan=life,
  )


def _error(status: int, message: str) -> JSONResponse:
  kind = 'invalid_request_error' if status < 429 else 'server_error'
  kind = 'rate_limit_error' if status == 429 else kind
  error = {'message': message, 'type': kind, 'param': None, 'code': None}
  headers = {'retry-after': '1'} if status == 429 else None
  return JSONResponse({'error': error}, status_code=status, headers=headers)


class _Answer:
  """The samples of one request, as they grow."""

  def __init__(self, engine, loaded, name, job: validation.Job, talking: bool):
    self._engine, self._loaded, self._job = engine, loaded, job
    self._talking, self._tickets, self._tokens = talking, [], 0
    self._merged = asyncio.Queue()
    self._pumps = []
    total = len(job.prompts) * job.samples
    self._growing = [
      text.Growing(loaded.words, job.stops) for _ in range(total)
    ]
    self._left = set(range(total))
    kind = 'chat.completion' if talking else 'text_completion'
    prefix = 'chatcmpl' if talking else 'cmpl'
    self._head = {
      'id': f'{prefix}-{secrets.token_hex(12)}',
      'object': kind + ('.chunk' if talking and job.stream else ''),
      'created': int(time.time()),
      'model': name,
    }

  async def begin(self) -> None:
    """Submits every prompt, or none."""
    job = self._job
    try:
      for i, ids in enumerate(job.prompts):
        tickets, queue = await self._engine.submit(
          ids, job.new, samples=job.samples, stop_ids=self._loaded.ends,
          seed=job.seed % 2**31, **job.knobs,
        )  # fmt: skip
        self._tickets.append((tickets, queue, i * job.samples))
    except BaseException:
      self.end()
      raise

  def end(self) -> None:
    """Frees what is still running."""
    for pump in self._pumps:
      pump.cancel()
    for tickets, *_ in self._tickets:
      self._engine.cancel(tickets)

  async def _steps(self, request: Request | None = None):
    """(sample, new text, Event, reason) as they come, until all have ended."""

    async def pump(queue, first):
      while True:
        found = await queue.get()
        await self._merged.put(found and (first + found[0], found[1]))

    for _, queue, first in self._tickets:
      self._pumps.append(asyncio.create_task(pump(queue, first)))
    try:
      while self._left:
        try:
          found = await asyncio.wait_for(self._merged.get(), 0.5)
        except TimeoutError:
          found = ()
        if request and await request.is_disconnected():
          return
        if found == ():
          continue
        if found is None:
          raise validation.Refused(500, 'the engine has failed')
        at, event = found
        if at in self._left:
          yield self._grow(at, event)
    finally:
      self.end()

  def _grow(self, at: int, event):
    growing, reason = self._growing[at], event.reason
    if reason == 'broken':
      raise validation.Refused(500, "the model's logits are not finite")
    self._tokens += 1
    ids = [] if reason == 'stop' else [event.token]
    new = growing.add(ids, last=bool(reason))
    if growing.ended and not reason:
      reason = 'stop'
      tickets, _, first = self._tickets[at // self._job.samples]
      self._engine.cancel([tickets[at - first]])
    if reason:
      self._left.discard(at)
    return at, new, event, reason

  async def whole(self, request: Request) -> dict:
    """The answer in one piece."""
    total = len(self._growing)
    texts, reasons, logs = (
      [''] * total,
      [None] * total,
      [[] for _ in range(total)],
    )
    async for at, new, event, reason in self._steps(request):
      texts[at] += new
      reasons[at] = reason or None
      logs[at].append(event)
    choices = [
      self._choice(i, *parts, part='message')
      for i, parts in enumerate(zip(texts, reasons, logs, strict=True))
    ]
    return {**self._head, 'choices': choices, 'usage': self._usage()}

  async def lines(self):
    """The answer as server-sent events."""
    line = lambda value: f'data: {json.dumps(value, ensure_ascii=False)}\n\n'
    try:
      async for at, new, event, reason in self._steps():
        choice = self._choice(at, new, reason or None, [event], part='delta')
        yield line({**self._head, 'choices': [choice]})
    except validation.Refused as error:
      yield line({'error': {'message': str(error), 'type': 'server_error'}})
    if self._job.usage:
      yield line({**self._head, 'choices': [], 'usage': self._usage()})
    yield 'data: [DONE]\n\n'

  def _choice(self, at, new, reason, events, part) -> dict:
    found = {'index': at, 'finish_reason': reason, 'logprobs': None}
    spelt = [self._loaded.words.decode([e.token]) for e in events]
    values = [e.log_prob for e in events]
    if self._talking:
      found[part] = {'role': 'assistant', 'content': new}
      if self._job.logprobs:
        found['logprobs'] = {
          'content': [
            {'token': t, 'logprob': v, 'bytes': None, 'top_logprobs': []}
            for t, v in zip(spelt, values, strict=True)
          ]
        }
    else:
      found['text'] = new
      if self._job.logprobs:
        found['logprobs'] = {'tokens': spelt, 'token_logprobs': values}
    return found

  def _usage(self) -> dict:
    given = sum(map(len, self._job.prompts))
    return {
      'prompt_tokens': given,
      'completion_tokens': self._tokens,
      'total_tokens': given + self._tokens,
    }
