"""The endpoint: OpenAI's protocol, limits, and clients that go away."""

import asyncio
import http.client
import json
import pathlib
import resource
import threading
import time

import numpy as np
import openai
import pytest
import uvicorn

from experiments import opened, text
from experiments.serving import endpoint, scheduler, validation
from experiments.serving.engine import Engine
from mla_moe import CacheConfig, load_huggingface, rollout
from mla_moe.data import tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
PAGES, WAITING = 24, 6
JSON = {'content-type': 'application/json'}


class Server:
  """A model behind an endpoint on a port of its own."""

  def __init__(self):
    config, variables = load_huggingface(GOLDEN / 'v2_lite')
    words = tokenizer.ByteTokenizer()
    ends = (config.eos_id,)
    self.model = opened.TextModel(config, variables, words, GOLDEN, ends)
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
    app = endpoint.app(self.engine, self.model, 'tiny', body_limit=5000)
    settings = uvicorn.Config(app, port=0, log_level='error', ws='none')
    self.core = uvicorn.Server(settings)
    self.thread = threading.Thread(target=self.core.run, daemon=True)
    self.thread.start()
    while not self.core.started:
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
    for _ in range(600):
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
  stop = whole[3:5]
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
    (400, 'max_new_tokens', dict(max_tokens=64)),
    (400, 'prompt', dict(prompt=[])),
    (400, 'prompt', dict(prompt=[[1, 259]])),
    (400, 'samples', dict(n=0)),
    (400, 'max_tokens', dict(max_tokens='8')),
    (400, 'echo', dict(echo=True)),
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
  # Client and server are one process here: two files a request.
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))

  async def one():
    reader, writer = await asyncio.open_connection('127.0.0.1', server.port)
    body = json.dumps(completion(max_tokens=2)).encode()
    head = (
      'POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n'
      'connection: close\r\ncontent-type: application/json\r\n'
      f'content-length: {len(body)}\r\n\r\n'
    )
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    return int(answer.split()[1])

  async def every():
    return await asyncio.gather(*(one() for _ in range(1000)))

  out = asyncio.run(every())
  assert set(out) == {200, 429} and len(out) == 1000
  assert server.idle()


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


def test_half_a_request_ends(server, monkeypatch):
  monkeypatch.setattr(validation, '_BODY_SECONDS', 0.2)
  line = server.connect(timeout=20)
  line.putrequest('POST', '/v1/completions')
  for name, value in {**JSON, 'content-length': '100'}.items():
    line.putheader(name, value)
  line.endheaders(b'{"prompt": ')
  answer = line.getresponse()
  assert answer.status == 408 and b'0.2 seconds' in answer.read()
  assert line.sock is None or line.sock.recv(1) == b''  # it is closed, too
  line.close()


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


@pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnhandledThreadExceptionWarning'
)
def test_an_error_of_a_cancel_ends_the_engine_and_is_kept():
  class Broken:
    length, free_pages, busy = 64, 0, False

    def submit_all(self, *_, **__):
      return [1, 2]

    def cancel(self, ticket):
      raise ValueError('of a bad day')

  async def ask():
    engine = Engine(Broken())
    tickets, events = await engine.submit([[1]], 1)
    engine.cancel(tickets[:1])
    assert await asyncio.wait_for(events.get(), 10) is None
    return engine

  engine = asyncio.run(ask())
  engine.close()  # its thread's exception belongs to this test
  assert isinstance(engine.failure, ValueError)


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
  class Broken:
    length, free_pages, busy = 64, 0, False

    def submit_all(self, *_, **__):
      self.busy = True
      return [1]

    def step(self):
      raise ValueError('of a bad day')

  async def ask():
    engine = Engine(Broken())
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
