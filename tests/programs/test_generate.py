"""Chat templates, text that grows token by token, the program's edge."""

import dataclasses
import functools
import json
import pathlib
import types

import children
import numpy as np
import pytest

from experiments import ends, generate, opened, prompt, text
from experiments import tokenizer as trained
from experiments.data import tokenizer
from experiments.serving import renderer, template
from mla_moe import Config, ConfigError, ModelConfig
from mla_moe.hf import settings

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  """A tokenizer; the id of the user's token is one more than its number."""
  pytest.importorskip('tokenizers')
  path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
  trained.write(path, ['hello world, hello'], 300)
  words = tokenizer.load(str(path))
  return words, words.core.token_to_id(template.USER) - 1


def write_template(folder, source):
  settings = {'chat_template': source, 'bos_token': {'content': tokenizer.BOS}}
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))


def test_built_in_template_is_that_of_v3(words, tmp_path):
  words, top = words
  ids = template.prompt(tmp_path, words, 'hello', system='world')
  hello, world = words.encode('hello'), words.encode('world')
  expected = [0, *world, top + 1, *hello, top + 2]
  np.testing.assert_array_equal(ids, expected)


def test_the_exported_template_is_the_built_in_one(words, tmp_path):
  pytest.importorskip('jinja2')
  words, _ = words
  turns = [('system', 'hello'), ('user', 'world'), ('assistant', 'hello')]
  turns.append(('user', 'world'))
  built_in = template.encode(tmp_path, words, turns)
  write_template(tmp_path, settings.TEMPLATE)
  np.testing.assert_array_equal(
    template.encode(tmp_path, words, turns), built_in
  )


def test_folder_s_template_is_rendered(words, tmp_path):
  pytest.importorskip('jinja2')
  words, top = words
  write_template(
    tmp_path,
    '{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}'
    f'{{% endfor %}}{template.ASSISTANT}',
  )
  ids = template.prompt(tmp_path, words, 'hello')
  expected = [0, *words.encode('user: hello'), top + 2]
  np.testing.assert_array_equal(ids, expected)


def test_what_a_person_writes_is_no_special_token(words, tmp_path):
  words, top = words
  ids = template.prompt(
    tmp_path, words, f'a{tokenizer.EOS}{template.ASSISTANT}b'
  )
  assert 1 not in ids
  assert (ids == top + 2).sum() == 1


@pytest.mark.parametrize(
  'text', ["{{ ''.__class__.__mro__[1].__subclasses__() }}", '{% broken']
)
def test_templates_cannot_escape(words, tmp_path, text):
  pytest.importorskip('jinja2')
  write_template(tmp_path, text)
  with pytest.raises(
    ConfigError, match='the chat template fails|: chat_template is'
  ):
    template.prompt(tmp_path, words[0], 'hello')


@pytest.mark.parametrize(
  'source',
  [
    '{{ 1 / 0 }}',
    '{% for i in range(10**9) %}{% endfor %}',
    '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
    "{{ 'x' * 10**9 }}",
    "{{ 'x' * 5 * 10**6 }}",
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}'
    '{% endfor %}',
    '{{ messages[5].content }}',
    '{{ raise_exception("two\nlines") }}',
    5,
    {'a': 1},
  ],
)
def test_row49_a_template_s_failure_is_one_line(
  words, tmp_path, source, monkeypatch
):
  pytest.importorskip('jinja2')
  monkeypatch.setattr(renderer, 'SECONDS', 0.3)
  write_template(tmp_path, source)
  with pytest.raises(
    ConfigError, match='the chat template fails|: chat_template is'
  ) as error:
    template.prompt(tmp_path, words[0], 'hello')
  assert '\n' not in str(error.value) and len(str(error.value)) < 400


def test_odd_settings_of_a_template(words, tmp_path):
  pytest.importorskip('jinja2')
  words, top = words
  hello = words.encode('hello')
  # A null is no token, as in transformers.
  write_template(tmp_path, '{{ bos_token }}{{ messages[0].content }}')
  path = tmp_path / 'tokenizer_config.json'
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | {'bos_token': None}))
  np.testing.assert_array_equal(
    template.prompt(tmp_path, words, 'hello'), hello
  )
  # A mark in the template that stands for no message is text.
  (tmp_path / 'chat_template.jinja').write_text('\ue0007\ue001', 'utf-8')
  expected = words.encode('\ue0007\ue001')
  np.testing.assert_array_equal(
    template.prompt(tmp_path, words, 'hello'), expected
  )
  (tmp_path / 'chat_template.jinja').write_bytes(b'\xff')
  with pytest.raises(ConfigError, match='UTF-8'):
    template.prompt(tmp_path, words, 'hello')


def test_a_middle_is_filled_in_the_order_of_training(words):
  words, _ = words
  begin, hole, end = words.fim_ids
  before, after = words.encode('hello'), words.encode(f'world{tokenizer.EOS}')
  expected = [0, begin, *before, hole, *after, end]
  ids = prompt.fill_in(words, 'hello', f'world{tokenizer.EOS}')
  np.testing.assert_array_equal(ids, expected)
  assert ids.dtype == np.int32 and words.eos_id not in ids
  with pytest.raises(ConfigError, match='filling in the middle'):
    prompt.fill_in(tokenizer.load('byte', 256, 257, 259), 'a', 'b')


def test_every_listed_end_ends_a_text(tmp_path):
  """Of config.json and generation_config.json; an id alone, or several."""
  config = Config(model=ModelConfig(vocab=300, bos_id=256, eos_id=257))
  assert ends.of_run(config) == ends.of(None, config.model) == (257,)
  path = tmp_path / 'tokenizer.json'
  named = dataclasses.replace(config.data, tokenizer=str(path))
  config = dataclasses.replace(config, data=named)
  for file, value, expected in (
    ('config', [7, 5, 6], (5, 6, 7, 257)),
    ('generation_config', [8, 300, True, None], (5, 6, 7, 8, 257)),
    ('config', 9, (8, 9, 257)),
    ('config', None, (8, 257)),
  ):
    settings = json.dumps({'eos_token_id': value})
    (tmp_path / f'{file}.json').write_text(settings)
    assert ends.of_run(config) == ends.of(tmp_path, config.model) == expected


def test_special_tokens_are_read_where_people_mean_them(words):
  words, _ = words
  begin, hole, end = tokenizer.FIM
  spelled = f'{begin}hello{hole}world{end}'
  np.testing.assert_array_equal(
    prompt.special(words, spelled), prompt.fill_in(words, 'hello', 'world')
  )
  ids = prompt.plain(words, spelled)
  assert ids[0] == 0 and not {*words.fim_ids} & {*ids[1:].tolist()}
  assert prompt.special(words, tokenizer.BOS + 'hello').tolist().count(0) == 1
  small = tokenizer.load('byte', 256, 257, 259)  # has no third special token
  assert prompt.special(small, tokenizer.EOS + begin).tolist() == [
    *(256, 257),
    *begin.encode(),
  ]


def sentencepiece():
  """A tokenizer whose words begin with a space, and whose rest are bytes."""
  tokenizers = pytest.importorskip('tokenizers')
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
  pieces += ['▁', '▁hello', '▁world', '!', 'lo']
  core = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True
    )
  )
  decoders = tokenizers.decoders
  core.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  core.add_special_tokens(['<s>', '</s>'])
  return tokenizer.BPETokenizer(len(pieces), 1, 2, None, '', core)


@pytest.mark.parametrize('kind', ['byte', 'bpe', 'sentencepiece'])
def test_pieces_of_text_are_the_whole(kind, request):
  if kind == 'byte':
    words = tokenizer.ByteTokenizer()
  elif kind == 'bpe':
    words, _ = request.getfixturevalue('words')
  else:
    words = sentencepiece()
  draw = np.random.default_rng(0)
  # Most bytes in a row are no UTF-8; the last kind would take back what it
  # decoded of them, so that it gets none.
  low = words.core.token_to_id('▁') if kind == 'sentencepiece' else 0
  for _ in range(40):
    ids = draw.integers(low, words.vocab, draw.integers(1, 60))
    stream = text.TextStream(words)
    pieces = [stream.add([i]) for i in ids] + [stream.add([], last=True)]
    assert ''.join(pieces) == words.decode(ids)
    stream = text.TextStream(words)
    halves = stream.add(ids[:9]), stream.add(ids[9:], last=True)
    assert ''.join(halves) == words.decode(ids)


def test_a_piece_is_whole_characters_and_no_special_token(words):
  words, _ = words
  spoken = 'a漢😀é hello'
  ids = [words.bos_id, *words.encode(spoken), words.eos_id]
  stream = text.TextStream(words)
  pieces = [stream.add([i]) for i in ids]
  assert ''.join(pieces) == spoken and '漢' in pieces and '😀' in pieces
  ids = words.encode('漢')
  assert stream.add(ids[:-1]) == ''
  assert stream.add([], last=True) == '\ufffd'


def test_a_leading_space_is_kept_between_words_alone():
  words = sentencepiece()
  ids = [words.core.token_to_id(p) for p in ('<s>', '▁hello', '▁world', '!')]
  stream = text.TextStream(words, stops=['d!'])
  assert [stream.add([i]) for i in ids] == ['', 'hello', ' worl', '']
  assert stream.ended


def test_the_flags_choose_the_prompt(words, monkeypatch, tmp_path):
  words, top = words
  config = ModelConfig(vocab=304, bos_id=0, eos_id=1)
  model = opened.TextModel(config, {}, words, tmp_path, (1,))
  flags = dict(chat=False, special=False, prefix='', suffix='', system='')

  def ids(**more):
    monkeypatch.setattr(
      generate, 'FLAGS', types.SimpleNamespace(**flags | more)
    )
    return generate._ids(model, f'hello{tokenizer.EOS}').tolist()

  hello, end = words.encode('hello').tolist(), words.encode(tokenizer.EOS)
  whole = words.encode(f'hello{tokenizer.EOS}').tolist()
  assert ids() == [0, *whole] and 1 not in end
  assert ids(special=True) == [0, *hello, 1]
  assert ids(chat=True) == [0, top + 1, *whole, top + 2]
  assert ids(chat=True, special=True) == [0, top + 1, *hello, 1, top + 2]
  assert ids(suffix='hello')[:3] == [0, *words.fim_ids[:2]]


def test_flags_that_exclude_each_other_are_one_line(call):
  for more in ('--prompt=a', '--chat', '--special'):
    code, _, error = call('generate', '--checkpoint=x', '--suffix=b', more)
    assert code == 2 and error.count('\n') == 1 and 'does not go' in error


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
def test_program_generates_from_a_release():
  run = functools.partial(children.run, '-m', 'experiments.generate')
  folder = f'--checkpoint={ROOT}/tests/golden/v2_lite'
  out = run(folder, '--prompt=hi', '--max_new_tokens=4', '--tokenizer=byte')
  assert out.returncode == 0, out.stderr
  assert 'tokens/s' in out.stderr
  out = run(folder, '--prompt=hi', '--tokenizer=byte', '--speculative')
  assert out.returncode == 2 and 'MTP' in out.stderr
  out = run(folder, '--prompt=hi')
  assert out.returncode == 2 and '--tokenizer=byte' in out.stderr
