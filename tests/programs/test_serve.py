"""The endpoint: limits, odd requests, errors, and clients that go away.

The protocol's fields are in test_protocol.
"""

import asyncio
import http.client
import json
import resource
import socket
import threading
import time
from unittest import mock

import hypothesis
import numpy as np
import openai
import pytest
import shallow
import uvicorn
from asgi import call
from hypothesis import strategies as st
from uvicorn.server import ServerState

from experiments import opened, text
from experiments.data import tokenizer
from experiments.serving import (
  body,
  connections,
  endpoint,
  scheduler,
  validation,
)
from experiments.serving.engine import Engine
from mla_moe import CacheConfig, rollout

PAGES, WAITING = 20, 6
JSON = {'content-type': 'application/json'}


class Server:
  """A model behind an endpoint on a port of its own."""

  def __init__(self):
    config, variables = shallow.load()
    words = tokenizer.ByteTokenizer()
    ends = (config.eos_id,)
    self.model = opened.TextModel(
      config, variables, words, shallow.GOLDEN, ends
    )
    self.work = scheduler.Scheduler(
      config,
      variables,
      rows=3,
      length=64,
      pages=PAGES,
      chunk=16,
      waiting=WAITING,
      cache=CacheConfig(page=8),
    )
    self.engine = Engine(self.work)
    self.app = endpoint.app(self.engine, self.model, 'tiny', body_limit=5000)
    settings = connections.settings(self.app, '127.0.0.1', 0, log_level='error')
    self.core = uvicorn.Server(settings)
    self.thread = threading.Thread(target=self.core.run, daemon=True)
    self.thread.start()
    while not self.core.started:
      assert self.thread.is_alive()
      time.sleep(0.02)
    self.port = self.core.servers[0].sockets[0].getsockname()[1]

  def connect(self, timeout=120):
    return http.client.HTTPConnection('127.0.0.1', self.port, timeout=timeout)

  def ask(self, path, body=None, raw=None, headers=None):
    """(status, JSON or text) of one request."""
    line = self.connect()
    data = raw if raw is not None else body and json.dumps(body)
    method = 'POST' if data is not None else 'GET'
    line.request(method, path, data, JSON | (headers or {}))
    answer = line.getresponse()
    out = answer.read().decode()
    line.close()
    isjson = answer.headers['content-type'].startswith('application/json')
    return answer.status, json.loads(out) if isjson else out

  def idle(self):
    """Waits until nothing runs."""
    for _ in range(4000):
      if not self.work.busy and self.work.free_pages == PAGES:
        return True
      time.sleep(0.05)
    return False


@pytest.fixture(scope='module')
def server():
  out = Server()
  yield out
  out.core.should_exit = True
  out.thread.join()


def completion(**more):
  return {'prompt': 'hi', 'max_tokens': 8, 'temperature': 0, **more}


def test_models_and_health(server):
  status, out = server.ask('/v1/models')
  assert status == 200 and out['data'][0]['id'] == 'tiny'
  assert server.ask('/healthz')[1]['status'] == 'ok'


def test_completion_equals_the_rollout(server):
  config, words = server.model.config, server.model.tokenizer
  ids = [config.bos_id, *words.encode('hi').tolist()]
  alone = rollout(
    config,
    server.model.variables,
    np.array([ids]),
    8,
    stop_ids=[config.eos_id],
  )
  status, out = server.ask('/v1/completions', completion(logprobs=1))
  assert status == 200
  (choice,) = out['choices']
  assert choice['text'] == words.decode(alone.tokens[0])
  assert choice['finish_reason'] == 'length'
  np.testing.assert_allclose(
    choice['logprobs']['token_logprobs'], alone.log_probs[0], atol=1e-4
  )
  assert out['usage'] == {
    'prompt_tokens': 3,
    'completion_tokens': 8,
    'total_tokens': 11,
  }
  # By ids, several prompts, several samples.
  status, out = server.ask(
    '/v1/completions', completion(prompt=[ids, ids], n=2)
  )
  assert [c['text'] for c in out['choices']] == [choice['text']] * 4
  assert server.idle()


def test_streamed_pieces_are_the_whole(server):
  whole = server.ask('/v1/completions', completion())[1]['choices'][0]
  ask = completion(stream=True, stream_options={'include_usage': True})
  status, out = server.ask('/v1/completions', ask)
  lines = [x[6:] for x in out.split('\n\n') if x]
  assert status == 200 and lines.pop() == '[DONE]'
  pieces = [json.loads(line) for line in lines]
  assert pieces.pop()['usage']['completion_tokens'] == 8
  choices = [piece['choices'][0] for piece in pieces]
  assert ''.join(c['text'] for c in choices) == whole['text']
  assert choices[-1]['finish_reason'] == 'length' and len(choices) > 4


def test_stop_texts_end_a_sample(server):
  whole = server.ask('/v1/completions', completion())[1]['choices'][0]['text']
  for stop in (whole[3:5], whole[-2:]):  # the latter by the last token
    out = server.ask('/v1/completions', completion(stop=[stop]))[1]
    (choice,) = out['choices']
    assert choice['text'] == whole[: whole.index(stop)]
    assert choice['finish_reason'] == 'stop'
  assert server.idle()


@pytest.mark.parametrize(
  'status, words, more',
  [
    (400, 'temperature', dict(temperature=-1)),
    (400, 'top_p', dict(top_p=0)),
    (400, 'max_tokens: this model', dict(max_tokens=62)),
    (400, 'prompt: this model', dict(prompt=[1] * 65, max_tokens=0)),
    (400, 'prompt: this model', dict(prompt=[1] * 64)),
    (400, 'prompt', dict(prompt=[])),
    (400, 'prompt', dict(prompt=[[1, 259]])),
    (400, 'samples', dict(n=0)),
    (400, 'max_tokens', dict(max_tokens='8')),
    (400, 'suffix', dict(prompt=[1], suffix='a')),
    (400, 'best_of', dict(n=2, best_of=1)),
    (400, 'best_of', dict(n=1, best_of=2, stream=True)),
    (400, 'prompt_logprobs', dict(prompt_logprobs=1, stream=True)),
    (400, 'stream_options', dict(stream_options=dict(include_usage=True))),
    (404, 'not served', dict(model='another')),
    (400, 'stop', dict(stop=[3])),
    (400, 'temperature', dict(temperature=float('inf'))),
    (400, 'top_k', dict(top_k=1.5)),
    (400, 'top_k', dict(top_k=10**400)),
    (400, 'temperature', dict(temperature=10**400)),
    (400, 'temperature', dict(temperature=1e-60)),
    (400, 'repetition_penalty', dict(repetition_penalty=1e-60)),
    (400, 'repetition_penalty', dict(repetition_penalty=1e300)),
    (400, 'top_p', dict(top_p=1e-60)),
    (400, 'max_tokens', dict(max_tokens=10**400)),
    (400, 'n=1025', dict(n=1025)),
    (400, '16 samples', dict(prompt=['a'] * 64, n=17)),
    (400, '256 characters', dict(stop='x' * 257)),
    (400, 'not supported', {'\ud800': 1}),
    (413, 'longer', dict(prompt='x' * 6000)),
  ],
)
def test_bad_requests_are_said(server, status, words, more):
  out = server.ask('/v1/completions', completion(**more))
  assert out[0] == status and words in out[1]['error']['message']


def test_any_text_is_a_prompt(server):
  for prompt in ('\ud800', '', '\0', '<｜User｜>'):
    assert server.ask('/v1/completions', completion(prompt=prompt))[0] == 200


def test_bodies_that_are_no_json(server):
  for raw in ('{', '[]', '[' * 4000):
    assert server.ask('/v1/completions', raw=raw)[0] == 400
  status, out = server.ask(
    '/v1/chat/completions', {'messages': [{'role': 'user', 'content': 'hi'}]}
  )  # bytes have no chat tokens
  assert status == 400 and 'token' in out['error']['message']
  model = server.model._replace(template='{{ messages[0].content }}')
  body = {'messages': [{'role': 'user', 'content': 'hi'}]}
  assert validation.parse(body, model, True, 64).prompts == [list(b'hi')]
  for path, method, status in (
    ('/v1/embeddings', 'POST', 404),
    ('/v1/completions', 'GET', 405),
  ):
    line = server.connect()
    line.request(method, path)
    answer = line.getresponse()
    error = json.loads(answer.read())['error']
    assert answer.status == status and error['type'] == 'invalid_request_error'
    line.close()


def test_a_client_that_goes_away_frees_its_row(server):
  for stream in (True, False):
    line = server.connect()
    ask = completion(max_tokens=60, stream=stream, n=8)
    line.request('POST', '/v1/completions', json.dumps(ask), JSON)
    if stream:
      line.getresponse().read(10)
    line.close()
    assert server.idle()


def test_many_requests_at_once_are_answered_or_refused(server):
  body = json.dumps(completion(max_tokens=2)).encode()

  async def flood():
    requests = [call(server.app, '/v1/completions', body) for _ in range(400)]
    return await asyncio.gather(*requests)

  statuses = [status for status, _ in asyncio.run(flood())]
  assert set(statuses) == {200, 429} and len(statuses) == 400
  assert server.idle()


_EXTREMES = [0, -1, 2**31, 2**64, 10**400, 1e-60, 1e300, np.nan, np.inf]
_ODD = st.one_of(
  st.sampled_from(_EXTREMES),
  st.none() | st.booleans(),
  st.text(max_size=5),
  st.lists(st.sampled_from(_EXTREMES) | st.integers(-1, 300), max_size=3),
  st.dictionaries(st.text(max_size=3), st.integers(), max_size=1),
)
_TEXT = st.text(min_size=1, max_size=9)
_ROLES = st.sampled_from(['user', 'system', 'tool'])
_MESSAGE = st.fixed_dictionaries({'role': _ROLES, 'content': _TEXT | _ODD})
_GOOD = {
  'prompt': _TEXT | st.lists(_TEXT | _ODD, max_size=3),
  'messages': st.lists(_MESSAGE | _ODD, max_size=3),
  'max_tokens': st.integers(0, 20),
  'n': st.integers(1, 4),
  'stop': _TEXT | st.lists(_TEXT, max_size=9),
  'stream': st.booleans(),
  'stream_options': st.just({'include_usage': True}),
  'seed': st.integers(),
  'logprobs': st.booleans() | st.integers(0, 20),
  'prompt_logprobs': st.integers(0, 20),
  'echo': st.booleans(),
  'best_of': st.just(4),
  'suffix': st.just(''),
  'stop_token_ids': st.lists(st.integers(0, 258), max_size=3),
  'ignore_eos': st.booleans(),
  'frequency_penalty': st.just(0),
  'response_format': st.just({'type': 'text'}),
  'temperature': st.floats(0, 3),
  'top_k': st.integers(0, 300),
  'top_p': st.floats(0.01, 1),
  'min_p': st.floats(0, 1),
  'repetition_penalty': st.floats(0.5, 2),
}
# Most fields of most requests are good: others never reach the engine.
_FIELDS = {
  name: st.sampled_from([good] * 24 + [_ODD]).flatmap(lambda kind: kind)
  for name, good in _GOOD.items()
}
_BODY = st.fixed_dictionaries(
  {'prompt': _FIELDS.pop('prompt')}, optional=_FIELDS
)
_PATHS = st.sampled_from(['/v1/completions'] * 4 + ['/v1/chat/completions'])


def walk(server, requests):
  """The statuses of odd requests, after each of which the server is well."""
  answers = []

  @hypothesis.settings(
    max_examples=requests, derandomize=True, deadline=None, database=None
  )
  @hypothesis.given(_PATHS, _BODY, st.sampled_from([False] * 3 + [True]))
  def one(path, body, leaves):
    answers.append(check(server, path, body, leaves))
    status, health = asyncio.run(call(server.app, '/healthz'))
    assert status == 200 and health['status'] == 'ok'
    assert health['failures'] == 0

  one()
  assert server.idle() and server.engine.failure is None
  return answers


def check(server, path, body, leaves=False):
  """The status of one request, which is answered or refused in a line."""
  ask = call(server.app, path, json.dumps(body).encode(), leaves)
  status, answer = asyncio.run(asyncio.wait_for(ask, 120))
  if status != 200:
    assert status in (400, 413, 429)
    line = answer['error']['message']
    assert line and '\n' not in line and len(line) < 400
  elif not body.get('stream') and not leaves:
    assert all(choice['finish_reason'] for choice in answer['choices'])
  return status


def test_no_number_in_any_field_breaks_the_server(server):
  for name in _GOOD.keys() - {'messages'}:
    for value in _EXTREMES:
      kinds = [value]
      if name in ('prompt', 'stop', 'stream_options', 'stop_token_ids'):
        kinds += [[value], [[value]], {'include_usage': value}]
      for odd in kinds:
        body = completion(max_tokens=1) | {name: odd}
        assert check(server, '/v1/completions', body) in (200, 400)
  assert server.idle() and server.engine.failure is None


def test_row47_a_random_walk_of_requests_leaves_the_server_whole(server):
  answers = walk(server, 100)
  assert answers.count(200) > 10 and answers.count(400) > 10


@pytest.mark.by_hand
@pytest.mark.timeout(0)
def test_thousands_of_requests_leave_the_server_whole(server):
  answers = walk(server, 2000)
  assert answers.count(200) > 200 and answers.count(400) > 200


def test_a_client_that_stalls_has_a_timer():
  """It owes a head, or does not read; a byte more starts no other timer."""

  async def drive():
    ready = asyncio.Event()

    async def app(scope, receive, send):
      await ready.wait()
      await send({'type': 'http.response.start', 'status': 200})
      await send({'type': 'http.response.body'})

    settings = connections.settings(app, 'x', 0, log_config=None)
    line = connections.Protocol(settings, ServerState(), {})
    line.connection_made(
      mock.Mock(is_closing=lambda: False, get_extra_info=lambda _: None)
    )
    timer = line._timer
    line.data_received(b'GET / HTTP/1.1\r\nhost: x\r\n')
    assert line._timer is timer and not timer.cancelled()
    line.data_received(b'\r\n')  # the head is whole: the server's turn
    assert line._timer is None and timer.cancelled()
    line.pause_writing()
    assert not line._timer.cancelled()
    line.resume_writing()
    assert line._timer is None
    ready.set()
    await asyncio.gather(*line.tasks)
    timer = line._timer  # of the next head
    assert not timer.cancelled()
    line.connection_lost(None)
    assert timer.cancelled()

  asyncio.run(drive())


def test_openai_s_own_client(server):
  client = openai.OpenAI(
    base_url=f'http://127.0.0.1:{server.port}/v1', api_key='none', max_retries=0
  )
  with client:
    assert client.models.list().data[0].id == 'tiny'
    ask = dict(model='tiny', **completion())
    whole = client.completions.create(**ask).choices[0].text
    parts = client.completions.create(**ask, stream=True)
    assert ''.join(p.choices[0].text for p in parts) == whole
    with pytest.raises(openai.BadRequestError, match='top_p'):
      client.completions.create(**ask | dict(top_p=0.0))
    with pytest.raises(openai.NotFoundError) as caught:
      client.completions.create(**ask | dict(model='another'))
    assert caught.value.code == 'model_not_found'
    assert client.models.retrieve('tiny').id == 'tiny'
    scored = client.completions.create(**ask, echo=True, logprobs=2, n=2)
    assert scored.choices[1].text == 'hi' + whole
    columns = scored.choices[0].logprobs
    assert columns.tokens[1:3] == ['h', 'i'] and len(columns.top_logprobs) == 11
    assert columns.token_logprobs[0] is columns.top_logprobs[0] is None


def test_a_number_of_samples_makes_nothing_before_it_is_checked(server):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  status, out = server.ask('/v1/completions', completion(n=10**9))
  assert status == 400 and 'n=1000000000' in out['error']['message']
  # 10**9 samples are some 400 GB, 100 MiB are none of them.
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert after - before < 100 * 1024


@pytest.mark.parametrize(
  'status, headers',
  [
    (200, {'content-type': 'application/json; charset=utf-8'}),
    (200, {'host': 'localhost:8000'}),
    (200, {'host': '[::1]:8000'}),
    (400, {'host': 'evil.example'}),
    (403, {'origin': 'http://evil.example'}),
    (403, {'origin': 'http://localhost:3000'}),
    (403, {'origin': 'null'}),
    (415, {'content-type': 'text/plain'}),
    (415, {'content-type': 'application/x-www-form-urlencoded'}),
    (415, {'content-type': ''}),
  ],
)
def test_a_web_page_is_no_client(server, status, headers):
  ask = completion(max_tokens=1)
  assert server.ask('/v1/completions', ask, headers=headers)[0] == status
  if 'host' in headers:
    assert server.ask('/healthz', headers=headers)[0] == status


def test_row48_half_a_request_ends(server, monkeypatch):
  monkeypatch.setattr(body, '_SECONDS', 0.2)
  monkeypatch.setattr(connections.Protocol, 'seconds', 0.2)  # of the next head
  line = server.connect(timeout=20)
  line.putrequest('POST', '/v1/completions')
  for name, value in {**JSON, 'content-length': '100'}.items():
    line.putheader(name, value)
  line.endheaders(b'{"prompt": ')
  answer = line.getresponse()
  assert answer.status == 408 and b'0.2 seconds' in answer.read()
  assert line.sock is None or line.sock.recv(1) == b''  # it is closed, too
  line.close()


def test_row48_half_a_head_ends(server, monkeypatch):
  monkeypatch.setattr(connections.Protocol, 'seconds', 0.2)
  for start in (b'', b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n'):
    with socket.create_connection(('127.0.0.1', server.port)) as line:
      line.sendall(start)
      assert line.recv(1) == b''


def test_waiting_clients_that_go_away_leave_the_engine_whole(server):
  async def give_up():
    engine = server.engine
    # All rows decode, and four prompts wait, two of one length.
    open_ones, _ = await engine.submit([[1, 2, 3]], 50, samples=3)
    waiting = [await engine.submit([[4] * n], 3) for n in (3, 3, 2, 1)]
    for tickets, _ in waiting[1:]:  # not the first one
      engine.cancel(tickets)
    _, events = waiting[0]
    while not (await asyncio.wait_for(events.get(), 60))[1].reason:
      pass
    engine.cancel(open_ones)

  asyncio.run(give_up())
  assert server.idle() and server.engine.failure is None
  assert server.ask('/v1/completions', completion(max_tokens=1))[0] == 200


def test_the_prompts_of_a_request_are_taken_together(server):
  async def beside_another():
    engine = server.engine
    tickets, _ = await engine.submit([[1, 2]], 60, samples=4)
    status, out = await asyncio.to_thread(
      server.ask,
      '/v1/completions',
      completion(prompt=['a'] * 64, max_tokens=1),
    )
    engine.cancel(tickets)
    return status, out

  status, out = asyncio.run(beside_another())
  assert status == 200 and len(out['choices']) == 64
  assert server.idle()


def test_equal_prompts_draw_samples_of_their_own(server):
  ask = completion(prompt=['ab'] * 4, temperature=1.0, seed=3)
  four = server.ask('/v1/completions', ask)[1]['choices']
  one = server.ask('/v1/completions', ask | dict(prompt='ab', n=4))[1]
  assert [c['text'] for c in four] == [c['text'] for c in one['choices']]
  assert len({c['text'] for c in four}) == 4


class Broken:
  """A scheduler of bad days, which may be reset."""

  length, free_pages, busy = 64, 0, False

  def submit_all(self, *_, **__):
    self.busy = True
    return [1, 2]

  def step(self):
    raise ValueError('of a bad day')

  def cancel(self, ticket):
    raise ValueError('of a bad day')

  def reset(self):
    self.busy = False


def test_an_error_of_the_scheduler_ends_its_samples_and_not_the_engine(capfd):
  """The error of a step, and that of a cancel."""

  class Idle(Broken):
    def submit_all(self, *_, **__):
      return [1, 2]

  async def ask():
    engine = Engine(Broken())
    for _ in range(2):
      _, events = await engine.submit([[1]], 1)
      heard = [await asyncio.wait_for(events.get(), 10) for _ in range(2)]
      assert [(i, x.reason) for i, x in heard] == [(0, 'failed'), (1, 'failed')]
    idle = Engine(Idle())
    tickets, events = await idle.submit([[1]], 1)
    idle.cancel(tickets[:1])
    assert (await asyncio.wait_for(events.get(), 10))[0] == 1
    await idle.submit([[1]], 1)  # it goes on
    return engine, idle

  for engine in asyncio.run(ask()):
    assert engine.failure is None
    engine.close()
  assert capfd.readouterr().err.count('ValueError: of a bad day') == 3


def test_a_long_stop_costs_no_more_than_the_text():
  class Counting(str):
    looked = 0

    def __getitem__(self, part):
      Counting.looked += 1
      return str.__getitem__(self, part)

  stream = text.TextStream(tokenizer.ByteTokenizer(), [Counting('x' * 10**6)])
  assert ''.join(stream.add([i]) for i in b'abxxc') == 'abxxc'
  assert Counting.looked <= 1 + 1 + 1 + 2 + 3


def test_text_never_shows_half_a_character_or_a_stop():
  words = tokenizer.ByteTokenizer()
  stream = text.TextStream(words, stops=['END'])
  shown = [stream.add([i]) for i in 'aé'.encode()]
  assert shown == ['a', '', 'é']
  shown = [stream.add([i]) for i in b'xENyEND']
  assert shown == ['x', '', '', 'ENy', '', '', ''] and stream.ended
  stream = text.TextStream(words, stops=['END'])
  assert stream.add(list(b'EN'), last=True) == 'EN'


@pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnhandledThreadExceptionWarning'
)
def test_an_engine_that_fails_tells_everyone():
  class Lost(Broken):
    def submit_all(self, *_, **__):
      self.busy = True
      return [1]

    def reset(self):
      raise ValueError('of a worse day')

  async def ask():
    engine = Engine(Lost())
    tickets, events = await engine.submit([[1]], 1)
    assert tickets == [1] and await asyncio.wait_for(events.get(), 10) is None
    with pytest.raises(RuntimeError, match='stopped'):
      await engine.submit([[1]], 1)
    return engine

  engine = asyncio.run(ask())
  engine.close()  # its thread's exception belongs to this test
  assert isinstance(engine.failure, ValueError)


def test_the_first_answer_alone_says_that_it_compiles(capfd):
  """A long prompt takes steps without a token; they belong to it."""

  class Slow:
    length, free_pages, busy = 64, 0, False

    def submit_all(self, *_, **__):
      self.busy, self.rest = (
        True,
        [[], [], [scheduler.Event(1, 5, 0.0, 'stop')]],
      )
      return [1]

    def step(self):
      events = self.rest.pop(0)
      self.busy = bool(self.rest)
      return events

  async def ask():
    engine = Engine(Slow())
    for _ in range(2):
      _, events = await engine.submit([[1]], 1)
      assert (await asyncio.wait_for(events.get(), 10))[1].token == 5
    return engine

  asyncio.run(ask()).close()
  lines = capfd.readouterr().err.splitlines()
  assert lines[0] == 'The first answer: compiling, once ...'
  assert lines[1].startswith('Compiled in ') and len(lines) == 2
