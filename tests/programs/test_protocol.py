"""OpenAI's protocol: fields, log-probabilities, echoes and streams."""

import asyncio
import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shallow
from asgi import call
from tokenizers import Tokenizer, decoders, models

from experiments import opened
from experiments.data import tokenizer
from experiments.serving import (
  body,
  endpoint,
  fields,
  scheduler,
  spelling,
  template,
  validation,
)
from experiments.serving.engine import Engine
from mla_moe import CacheConfig, Transformer

DOCS = pathlib.Path(__file__).parents[2] / 'docs' / 'serving.md'
CHAT = [{'role': 'user', 'content': 'hi'}]


class Server:
  """A model behind an application without a port, with rows of 64 tokens."""

  def __init__(self, case='v2_lite', **options):
    config, self.variables = shallow.load(case)
    words = tokenizer.ByteTokenizer()
    self.model = opened.TextModel(
      config, self.variables, words, shallow.GOLDEN, (config.eos_id,)
    )
    self.work = scheduler.Scheduler(
      config,
      self.variables,
      rows=3,
      length=64,
      pages=20,
      chunk=16,
      cache=CacheConfig(page=8),
      **options,
    )
    self.engine = Engine(self.work)
    self.app = endpoint.app(
      self.engine, self.model, 'tiny', origins=['http://localhost:3000']
    )

  def ask(self, is_chat=False, **fields):
    """The answer to a request, which is served."""
    path = '/v1/chat/completions' if is_chat else '/v1/completions'
    own = {'messages': CHAT} if is_chat else {'prompt': 'hi'}
    sent = json.dumps({'temperature': 0, **own, **fields}).encode()
    status, out = asyncio.run(call(self.app, path, sent))
    assert status == 200, out
    return out

  def stream(self, **fields):
    """The events of a streamed answer."""
    lines = self.ask(stream=True, **fields).split('\n\n')[:-1]
    assert lines.pop() == 'data: [DONE]'
    return [json.loads(line.removeprefix('data: ')) for line in lines]


@pytest.fixture(scope='module')
def server():
  out = Server()
  yield out
  out.engine.close()


@pytest.fixture
def chats(monkeypatch):
  """Chats are the bytes of their last message: a template is another matter."""
  encode = lambda *args: np.frombuffer(args[2][-1][1].encode(), np.uint8)
  monkeypatch.setattr(template, 'encode', encode)


def table():
  """(field, is_chat, answered values, refused values) of the docs' rows."""
  rows = []
  text = DOCS.read_text('utf-8').split('### Fields of a request')[1]
  for line in re.findall(r'^\| `.*$', text, re.MULTILINE):
    name, kind, *values, _ = [x.strip() for x in line[1:-1].split('|')]
    good, bad = (map(json.loads, re.findall('`(.*?)`', x)) for x in values)
    kinds = [False, True] if kind == 'both' else [kind == 'chat']
    rows += [(name.strip('`'), k, [*good], [*bad]) for k in kinds[:1]]
    rows += [(name.strip('`'), k, *rows[-1][2:]) for k in kinds[1:]]
  return rows


# Fields that are good only beside another one.
_BESIDE = {
  'top_logprobs': {'logprobs': True},
  'stream_options': {'stream': True},
}


def test_each_row_of_the_docs_is_true(server, chats):
  rows = table()
  own = fields.COMPLETIONS, fields.CHAT
  other = fields.ANY | fields.HARMLESS.keys()
  for is_chat in (False, True):
    named = {name for name, k, *_ in rows if k == is_chat}
    assert named == fields.BOTH | own[is_chat] | other
  for name, is_chat, good, bad in rows:
    base = {'messages': CHAT} if is_chat else {'prompt': 'hi'}
    base |= {'seed': 3, **_BESIDE.get(name, {})}
    parse = lambda more, base=base, is_chat=is_chat: validation.parse(
      base | more, with_all_bytes(server.model), is_chat, 64
    )
    plain = parse({})
    assert good
    for value in good:
      got = parse({name: value})
      if name in other:
        assert got == plain, (name, value)
    assert bad or name in fields.ANY
    for value in bad:
      with pytest.raises((body.Refused, opened.ConfigError), match=name):
        parse({name: value})
  # Fields of the other endpoint, and unknown ones.
  for more in ({'top_logprobs': 2}, {'messages': CHAT}, {'thoughts': True}):
    with pytest.raises(body.Refused, match=next(iter(more))):
      validation.parse({'prompt': 'a'} | more, server.model, False, 64)
  validation.parse({'prompt': 'a', 'x': 0}, server.model, False, 64)


def test_numbers_become_those_of_the_sampler(server):
  parse = lambda **more: validation.parse(
    {'prompt': 'a'} | more, server.model, False, 64
  )
  assert parse(seed=-1).seed == parse(seed=2**31 - 1).seed == 2**31 - 1
  assert parse(max_tokens=8.0).max_new_tokens == 8
  assert parse(max_tokens=0).max_new_tokens == 0
  assert parse(top_k=-1).knobs['top_k'] == 0
  assert parse(prompt=[7] * 60).max_new_tokens == 4  # as many as fit of 16
  assert parse(prompt=[[5], 'a', [1, 2]]).prompts == [[5], [0, 97], [1, 2]]
  assert parse(add_special_tokens=False).prompts == [[97]]
  # A request whose second sample's seed is beyond the range.
  out = server.ask(seed=-1, n=2, max_tokens=3, temperature=1)
  assert len(out['choices']) == 2


def with_all_bytes(model):
  """The model, with as many tokens as the byte tokenizer, for parsing alone."""
  return model._replace(config=types.SimpleNamespace(bos_id=0, vocab=261))


def test_a_suffix_fills_in_the_middle(server):
  model = with_all_bytes(server.model)
  prompts = validation.parse(
    {'prompt': ['ab', 'c'], 'suffix': 'd'}, model, False, 64
  ).prompts
  assert prompts == [
    [256, 258, 97, 98, 259, 100, 260],
    [256, 258, 99, 259, 100, 260],
  ]
  model = server.model._replace(
    tokenizer=tokenizer.ByteTokenizer(258, fim_ids=None)
  )
  ask = {'prompt': 'a', 'suffix': 'd'}
  with pytest.raises(opened.ConfigError, match='suffix'):
    validation.parse(ask, model, False, 64)
  with pytest.raises(body.Refused, match='suffix'):
    validation.parse(ask, server.model, False, 64)


def golden_scores(server, length):
  """A golden text's first ids, and [T, V] log-probabilities after each of them
  by the training forward."""
  tokens = np.load(shallow.GOLDEN / 'v2_lite' / 'expected.npz')['tokens']
  apply = jax.jit(Transformer(server.model.config).apply)
  logits = apply(server.variables, tokens).logits[0, :length]
  return tokens[0, :length].tolist(), np.array(jax.nn.log_softmax(logits))


def test_a_prompt_is_scored_as_by_the_training_forward(server):
  """lm-evaluation-harness' request: two chunks and a half, and one token."""
  ids, wanted = golden_scores(server, 40)
  own = wanted[np.arange(39), ids[1:]]
  out = server.ask(prompt=[ids], max_tokens=1, logprobs=1, echo=True, seed=1234)
  (choice,) = out['choices']
  columns = choice['logprobs']
  assert [*map(len, columns.values())] == [41] * 4
  assert columns['token_logprobs'][0] is columns['top_logprobs'][0] is None
  np.testing.assert_allclose(columns['token_logprobs'][1:-1], own, atol=1e-5)
  likeliest = [max(top.values()) for top in columns['top_logprobs'][1:]]
  np.testing.assert_allclose(likeliest, wanted.max(-1), atol=1e-5)
  # A greedy answer is its position's likeliest token, to the bit.
  assert columns['token_logprobs'][-1] == likeliest[-1]
  # No token at all, and vLLM's form with ranks.
  out = server.ask(prompt=ids, max_tokens=0, prompt_logprobs=20)
  (choice,) = out['choices']
  assert choice['text'] == '' and choice['finish_reason'] == 'length'
  assert out['usage']['completion_tokens'] == 0
  first, *tables = choice['prompt_logprobs']
  assert first is None and len(tables) == 39
  for row, token, entries in zip(wanted, ids[1:], tables, strict=False):
    order = np.argsort(-row)
    assert {*map(int, entries)} == {*order[:20].tolist(), token}
    for index, entry in entries.items():
      assert abs(entry['logprob'] - row[int(index)]) < 1e-5
      assert order[entry['rank'] - 1] == int(index)
  # The whole sequence is never on the host: [T, 20], and no logits.
  assert scheduler.programs.TOP == 20


def test_alternatives_of_an_answer_are_those_of_its_score(server):
  out = server.ask(max_tokens=6, logprobs=3, echo=True, n=2)
  first, second = out['choices']
  assert first['logprobs'] == second['logprobs']
  ids = [server.model.config.bos_id, *b'hi']
  plain = server.ask(max_tokens=6, prompt=ids, logprobs=0)['choices'][0]
  columns = plain['logprobs']
  assert [len(top) for top in columns['top_logprobs']] == [1] * 6
  assert first['text'] == 'hi' + plain['text']
  tops = first['logprobs']['top_logprobs']
  assert len(tops) == 9 and all(len(top) in (3, 4) for top in tops[1:])
  np.testing.assert_allclose(
    columns['token_logprobs'], first['logprobs']['token_logprobs'][3:]
  )
  assert [max(top, key=top.get) for top in tops[3:]] == columns['tokens']
  # The places: of the prompt, then of the answer after it.
  assert first['logprobs']['text_offset'][:4] == [0, 0, 1, 2]
  assert columns['text_offset'] == [
    i - 2 for i in first['logprobs']['text_offset'][3:]
  ]


def test_the_likeliest_of_several_samples_is_answered(server):
  ask = dict(max_tokens=5, temperature=1, seed=5, logprobs=0)
  drawn = server.ask(n=4, **ask)['choices']
  mean = lambda choice: np.mean(choice['logprobs']['token_logprobs'])
  out = server.ask(n=2, best_of=4, **ask)
  best = sorted(drawn, key=mean, reverse=True)[:2]
  assert [c['text'] for c in out['choices']] == [c['text'] for c in best]
  assert [c['index'] for c in out['choices']] == [0, 1]
  assert out['usage']['completion_tokens'] == 20


def test_a_stream_s_parts_are_the_whole(server):
  ask = dict(prompt=['ab', 'é'], max_tokens=4, n=2, logprobs=2, echo=True)
  choices = server.ask(**ask)['choices']
  *events, last = server.stream(**ask, stream_options={'include_usage': True})
  assert last['choices'] == [] and last['usage']['completion_tokens'] == 16
  assert all(event['usage'] is None for event in events)
  for choice in choices:
    parts = [event['choices'][0] for event in events]
    parts = [part for part in parts if part['index'] == choice['index']]
    assert ''.join(part['text'] for part in parts) == choice['text']
    assert parts[-1]['finish_reason'] == choice['finish_reason'] == 'length'
    for name, column in choice['logprobs'].items():
      assert sum((part['logprobs'][name] for part in parts), []) == column


def test_a_chat_s_log_probabilities_and_roles(server, chats):
  ask = dict(is_chat=True, max_tokens=5, logprobs=True, top_logprobs=2)
  out = server.ask(**ask, prompt_logprobs=1)
  (choice,) = out['choices']
  assert out['prompt_logprobs'][0] is None and len(out['prompt_logprobs']) == 2
  assert choice['message']['role'] == 'assistant'
  for entry in choice['logprobs']['content']:
    top = entry.pop('top_logprobs')
    assert len(top) == 2 and top[0] == entry
    if not entry['token'].startswith(('bytes:', 'token_id:')):
      assert bytes(entry['bytes']).decode() == entry['token']
  events = server.stream(**ask, n=2)
  deltas = [e['choices'][0] for e in events]
  for i in range(2):
    own = [c['delta'] for c in deltas if c['index'] == i]
    assert ['role' in delta for delta in own] == [True] + [False] * 4
    text = ''.join(delta['content'] for delta in own)
    assert text == choice['message']['content']
  named = server.ask(**ask, return_tokens_as_token_ids=True)['choices'][0]
  assert named['logprobs']['content'][0]['token'].startswith('token_id:')


def test_ends_of_a_request(server):
  whole = server.ask(max_tokens=6, logprobs=0, return_tokens_as_token_ids=True)
  ids = whole['choices'][0]['logprobs']['tokens']
  end = int(ids[3].removeprefix('token_id:'))
  ask = dict(max_tokens=6, stop_token_ids=[end], logprobs=0)
  (choice,) = server.ask(**ask)['choices']
  assert choice['finish_reason'] == 'stop'
  assert len(choice['logprobs']['tokens']) == ids.index(ids[3]) + 1
  model = server.model._replace(stop_ids=(end,))
  app, server.app = server.app, endpoint.app(server.engine, model, 'tiny')
  try:
    reasons = [
      server.ask(max_tokens=6, ignore_eos=x)['choices'][0]['finish_reason']
      for x in (False, True)
    ]
  finally:
    server.app = app
  assert reasons == ['stop', 'length']


def test_tokens_have_names_bytes_and_places():
  words = spelling.Spelling(tokenizer.ByteTokenizer())
  assert words.name(97) == 'a' and words.data(97) == b'a'
  assert words.name(0xC3) == 'bytes:\\xc3' and words.data(0xC3) == b'\xc3'
  assert words.name(256) == tokenizer.BOS and words.shown(256) == b''
  assert words.name(300) == 'token_id:300' and words.data(300) == b''
  places = spelling.Places(words, 5)
  text = 'aé🙂b'.encode()
  assert [places.add(i) for i in (256, *text)] == [*(5, 5, 6, 6, 7, 7, 7, 7, 8)]
  vocab = {'Ġa': 0, 'Ã': 1, '©': 2, 'é': 3}
  core = Tokenizer(models.BPE(vocab, []))
  core.decoder = decoders.ByteLevel()
  core.add_special_tokens(['<end>'])
  core.add_tokens(['中'])
  words = spelling.Spelling(
    types.SimpleNamespace(core=core, vocab=6, decode=core.decode)
  )
  assert [words.name(i) for i in range(6)] == [
    *(' a', 'bytes:\\xc3', 'bytes:\\xa9', 'bytes:\\xe9', '<end>', '中')
  ]
  assert words.shown(4) == b'' and words.shown(5) == '中'.encode()
  # The library tiktoken has the bytes of each token, and no unknown one.
  core = types.SimpleNamespace(
    decode_single_token_bytes={0: b'\xc3'}.__getitem__
  )
  read = spelling._reader(types.SimpleNamespace(core=core))
  assert read(0) == b'\xc3' and read(1) == b''


def send(app, method, path, headers):
  """(status, headers) of a request without a body."""
  out = []

  async def receive():
    return {'type': 'http.request', 'body': b'{"prompt": "a"}'}

  async def store(message):
    out.append(message)

  scope = dict(type='http', http_version='1.1', scheme='http', path=path)
  scope |= dict(method=method, query_string=b'')
  pairs = {'content-type': 'application/json', **headers}.items()
  scope['headers'] = [(k.encode(), v.encode()) for k, v in pairs]
  asyncio.run(app(scope, receive, store))
  return out[0]['status'], {
    k.decode(): v.decode() for k, v in out[0]['headers']
  }


def test_models_and_pages(server):
  path, page = '/v1/chat/completions', {'origin': 'http://localhost:3000'}
  asked = page | {'access-control-request-method': 'POST'}
  plain = endpoint.app(server.engine, server.model, 'org/tiny')
  assert send(plain, 'GET', '/v1/models/org/tiny', {})[0] == 200
  assert send(plain, 'GET', '/v1/models/other', {})[0] == 404
  # A preflight request is answered, and lets no page in.
  status, headers = send(plain, 'OPTIONS', path, asked)
  assert status == 200 and 'access-control-allow-origin' not in headers
  assert send(plain, 'POST', '/v1/completions', page)[0] == 403
  # Pages of a named origin may enter.
  allow = 'access-control-allow-origin'
  status, headers = send(server.app, 'OPTIONS', path, asked)
  assert status == 200 and headers[allow] == page['origin']
  status, headers = send(server.app, 'POST', '/v1/completions', page)
  assert status == 200 and headers[allow] == page['origin']
  evil = {'origin': 'http://evil.example'}
  status, headers = send(server.app, 'POST', '/v1/completions', evil)
  assert status == 403 and allow not in headers


@pytest.mark.slow
def test_drafts_change_no_score():
  ask = dict(max_tokens=12, logprobs=4, echo=True, prompt=[*range(20)])
  columns = []
  for speculative in (False, True):
    server = Server('v3_release', speculative=speculative)
    columns.append(server.ask(**ask)['choices'][0]['logprobs'])
    server.engine.close()
  plain, drafted = columns
  assert plain['tokens'] == drafted['tokens']
  flat = lambda c: jnp.array(
    [x for top in c['top_logprobs'][1:] for x in sorted(top.values())[-4:]]
  )
  np.testing.assert_allclose(flat(plain), flat(drafted), atol=1e-4)
