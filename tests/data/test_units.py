"""Units of work: whoever writes them, and however often, the stream is one."""

import codecs
import errno
import fcntl
import json
import multiprocessing
import os
import pathlib
import sys
import types

import numpy as np
import pytest
from texts import BYTE, documents_of, prepared, rows_of, small, write_folder

from experiments import cli
from experiments.data import (
  corpus,
  corpus_folder,
  encoders,
  making,
  tokenizer,
  units,
  workers,
)
from mla_moe.config import ConfigError

TEXTS = [f'row {i}: {"añ字" * (i % 13)}' for i in range(700)]


@pytest.fixture
def few_bytes(monkeypatch):
  """Units of 2 KB."""
  monkeypatch.setattr(units, '_LEAST_BYTES', 2000)


def write(folder, kind):
  """Writes a text of more than 256 documents."""
  folder.mkdir()
  if kind == 'txt':
    for i in range(0, 700):
      (folder / f'{i:03}.txt').write_text(TEXTS[i], encoding='utf-8')
  elif kind == 'parquet':
    rows_of('parquet', folder / 'a.parquet', TEXTS)
    parquet = pytest.importorskip('pyarrow.parquet')
    table = parquet.read_table(folder / 'a.parquet')
    parquet.write_table(table, folder / 'a.parquet', row_group_size=90)
  else:
    rows_of('jsonl', folder / 'a.jsonl', TEXTS)
    content = (folder / 'a.jsonl').read_bytes()
    if kind == 'marked':
      (folder / 'a.jsonl').write_bytes(codecs.BOM_UTF8 + content)
    if kind == 'utf-16':
      (folder / 'a.jsonl').write_text(content.decode(), encoding='utf-16')
    (folder / 'b.txt').write_text('a note\n')
  return str(folder)


def streams(text):
  return [np.asarray(part).tolist() for part in (text.train, text.heldout)]


@pytest.mark.parametrize(
  'kind, count',
  [('txt', 16), ('jsonl', 41), ('marked', 41), ('utf-16', 2), ('parquet', 8)],
)
def test_many_units_are_the_stream_of_one(tmp_path, monkeypatch, kind, count):
  config = small(source=write(tmp_path / 'text', kind), fim_rate=0.3)
  lines = []
  one = corpus.prepare(config, BYTE, tmp_path / 'one', lines.append)
  monkeypatch.setattr(units, '_LEAST_BYTES', 2000)
  many = corpus.prepare(config, BYTE, tmp_path / 'many', lines.append)
  paths = list((tmp_path / 'many' / many.fingerprint).glob('*.json'))
  shards = [path for path in paths if path.stem.isdigit()]
  assert len(shards) == count
  assert streams(many) == streams(one)
  assert many._replace(train=0, heldout=0) == one._replace(train=0, heldout=0)
  half = len(lines) // 2
  assert lines[half:] == lines[:half]
  assert len(documents_of(many.train)) > 256


def test_a_text_of_few_documents_is_weighed_whole(tmp_path, few_bytes):
  """Its last document's end is held out, wherever units would end."""
  folder = tmp_path / 'text'
  folder.mkdir()
  for i in range(3):
    (folder / f'{i}.txt').write_text(f'{i} is a line of a book\n' * 300)
  (unit,) = units.of(corpus.sources.listed(str(folder), 1.0).files)
  assert unit.size == sum(path.stat().st_size for path in folder.iterdir())
  text = prepared(small(source=str(folder), heldout=0.1), tmp_path / 'cache')
  part = len(text.heldout) / (len(text.heldout) + len(text.train))
  assert 0.05 < part < 0.2


def test_processes_and_shares_write_the_same_shards(tmp_path, few_bytes):
  config = small(source=write(tmp_path / 'text', 'jsonl'))
  one = prepared(config, tmp_path / 'one')
  cache, lines = tmp_path / 'two', []
  for share in ((0, 3), (2, 3)):
    corpus.prepare_share(config, BYTE, cache, share, lines.append)
  assert not list(cache.glob('[!.]*'))  # it is no corpus yet
  two = corpus.prepare(config, BYTE, cache, lines.append, processes=2)
  assert two.fingerprint == one.fingerprint
  for path in (tmp_path / 'one' / one.fingerprint).iterdir():
    same = cache / two.fingerprint / path.name
    assert same.read_bytes() == path.read_bytes()
  assert any('of 41 units were done before' in line for line in lines)
  assert os.listdir(cache) == [two.fingerprint]


def test_equal_documents_are_counted_across_units(tmp_path, few_bytes):
  """Each after its first, by content and not by name; no file of them stays."""
  rows = [f'row {i % 300}' for i in range(700)]
  rows_of('jsonl', tmp_path / 'rows.jsonl', rows)
  folder = write_folder(tmp_path / 'text')
  for name in ('00', '07'):
    content = pathlib.Path(f'{folder}/{name}.txt').read_bytes()
    pathlib.Path(f'{folder}/copy-of-{name}.txt').write_bytes(content)
  cache = tmp_path / 'cache'
  for source, right in ((tmp_path / 'rows.jsonl', 400), (folder, 2)):
    text = prepared(small(source=str(source)), cache)
    assert text.facts['duplicates'] == right
    part = right / text.facts['documents']
    row = ('duplicates', f'{right} ({part:.1%})')
    assert row in corpus_folder.table(text)
  assert len([*cache.glob('*/*.json')]) > 8 and not [*cache.glob('*/*.hashes')]


def test_hashes_are_compared_in_parts(tmp_path, monkeypatch):
  monkeypatch.setattr(making, '_HASH_BYTES', 1000)
  hashes = np.arange(300, dtype=np.uint64) * 2**40 + np.arange(300, dtype='u8')
  for number, part in enumerate((hashes, hashes[:99], hashes[:7])):
    part.tofile(tmp_path / f'{number:05}.hashes')
  assert making._duplicates(tmp_path, 3) == {'duplicates': 106}
  assert making._duplicates(tmp_path, 4) == {}  # a unit of an earlier version


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
  """One with them is none."""
  lines = []
  os.close(making.locked(tmp_path / 'a', True, lines.append))
  assert not lines

  def refused(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, 'flock', refused)
  handle = making.locked(tmp_path / 'a', False, lines.append)
  assert os.path.samestat(os.fstat(handle), os.stat(tmp_path / 'a'))
  os.close(handle)
  (line,) = lines
  why = os.strerror(errno.ENOLCK)
  assert f'{tmp_path}/a has no locks ({why}): ' in line


def test_a_large_text_has_a_hint(tmp_path, few_bytes, monkeypatch):
  monkeypatch.setattr(corpus, '_LARGE_BYTES', 999)
  config, lines = small(source=write(tmp_path / 'text', 'jsonl')), []
  corpus.prepare(config, BYTE, tmp_path / 'cache', lines.append)
  assert 'prepare, with the same words, uses all cores.' in lines[1]
  assert lines[0].startswith('Tokenising 2 files') and '0.1 MB' in lines[0]


def test_progress_is_speed_and_the_time_that_is_left(monkeypatch):
  """Units that were done before are done, and no part of the speed."""
  lines, seconds = [], iter([100.0, 105.0, 130.0, 140.0])
  monkeypatch.setattr(workers.time, 'monotonic', lambda: next(seconds))
  whole = [units.Unit(i, (), 10**9) for i in range(4)]
  progress = workers.Progress(whole, whole[1:], lines.append)
  progress.tell(1)  # too soon after the last
  progress.unit(whole[1])
  progress.tell(5 * 10**8)
  assert lines == [
    '  50.0%: 33.3 MB/s, 1 min left',
    '  62.5%: 37.5 MB/s, 1 min left',
  ]


def test_before_a_unit_is_done_there_is_no_speed(monkeypatch):
  lines, seconds = [], iter([100.0, 130.0])
  monkeypatch.setattr(workers.time, 'monotonic', lambda: next(seconds))
  whole = [units.Unit(i, (), 10**9) for i in range(4)]
  workers.Progress(whole, whole[1:], lines.append).tell(0)
  assert lines == ['  25.0%: no more is done since the start']


@pytest.mark.parametrize(
  ('message', 'error'),
  [
    (('error', 'a line'), ConfigError),
    (('disk', 'a line'), cli.Stopped),
  ],
)
def test_an_error_of_a_process_is_a_line_of_its_parent(message, error):
  ours, theirs = multiprocessing.Pipe()
  theirs.send(message)
  with pytest.raises(error, match='a line'):
    workers._follow([ours], [], [], None, None)


def test_a_unit_whose_facts_are_damaged_is_named(tmp_path, few_bytes):
  config = small(source=write(tmp_path / 'text', 'jsonl'))
  cache = tmp_path / 'cache'
  corpus.prepare_share(config, BYTE, cache, (0, 1), lambda line: None)
  (folder,) = cache.iterdir()
  for content in ('{}', '[]', '{"documents": 3}', 'text'):
    (folder / '00003.json').write_text(content)
    with pytest.raises(ConfigError, match='00003.json: is damaged') as error:
      prepared(config, cache)
    assert str(error.value).endswith(f'delete {folder} and start again')


def test_a_kill_costs_one_unit(tmp_path, few_bytes, monkeypatch):
  """The others stay, and a torn file of the one is written again."""
  config = small(source=write(tmp_path / 'text', 'jsonl'))
  one, cache = prepared(config, tmp_path / 'one'), tmp_path / 'two'
  write_unit, calls = units.write, []

  def killed(job, unit, encode, tell):
    calls.append(unit.number)
    if len(calls) == 8:
      (job.folder / '00007.train.new').write_bytes(b'half')
      raise KeyboardInterrupt
    write_unit(job, unit, encode, tell)

  monkeypatch.setattr(units, 'write', killed)
  with pytest.raises(KeyboardInterrupt):
    prepared(config, cache)
  (work,) = cache.iterdir()
  assert work.name.startswith('.part-')
  two = prepared(config, cache)
  assert calls == [*range(8), *range(7, 41)]
  assert streams(two) == streams(one)
  assert not list((cache / two.fingerprint).glob('*.new'))


@pytest.mark.parametrize(
  'processes', [1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_broken_row_is_named_by_its_line(tmp_path, few_bytes, processes):
  path = tmp_path / 'rows.jsonl'
  rows_of('jsonl', path, TEXTS)
  lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
  lines[432] = 'no row\n'
  path.write_text(''.join(lines), encoding='utf-8')
  with pytest.raises(ConfigError, match=r'rows.jsonl:433: not JSON'):
    corpus.prepare(
      small(source=str(path)), BYTE, tmp_path / 'c', str, processes=processes
    )


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  """A small BPE of DeepSeek's kind."""
  program = pytest.importorskip('experiments.tokenizer')
  pytest.importorskip('tokenizers', reason='extra [hf] is missing')
  folder = tmp_path_factory.mktemp('words') / 'bpe'
  program.write(folder, TEXTS, 400)
  return tokenizer.load(str(folder))


def fake(monkeypatch, encode):
  """Installs a gigatoken that encodes by `encode`; returns its tokenizers."""
  made = []

  class Fake:
    @classmethod
    def from_json(cls, text):
      made.append(json.loads(text))
      return cls()

    def encode_batch(self, texts):
      return encode(texts)

  rows = types.SimpleNamespace(
    flatten=np.concatenate, num=lambda rows: [len(row) for row in rows]
  )
  monkeypatch.setitem(
    sys.modules, 'gigatoken', types.SimpleNamespace(Tokenizer=Fake)
  )
  monkeypatch.setitem(sys.modules, 'awkward', rows)
  return made


def test_the_fast_encoder_is_used_where_its_ids_are_the_same(
  monkeypatch, words
):
  calls = []

  def encode(texts):
    calls.append(len(texts))
    return words.encode_batch(texts)

  values = fake(monkeypatch, encode)
  encoder = encoders.Encoder(words)
  assert [token['content'] for token in values[0]['added_tokens']] == []
  assert r'\'' not in json.dumps(values[0]['pre_tokenizer'])
  ids = encoder([*TEXTS[:5], 'half a pair \ud800'])
  assert calls == [6, 1] and 'gigatoken' in encoder.line
  own = words.encode_batch([*TEXTS[:5], 'half a pair \ud800'])
  assert [row.tolist() for row in ids] == [row.tolist() for row in own]


@pytest.mark.parametrize('wrong', ['word', 'special', 'later'])
def test_an_encoder_of_other_ids_is_not_believed(monkeypatch, words, wrong):
  """In the first documents, in a special token, in a later unit."""
  spoiled = {
    'word': lambda text: 'row 3' in text,
    'special': lambda text: '<｜' in text,
    'later': lambda text: 'row 333' in text,
  }[wrong]

  def encode(texts):
    rows = words.encode_batch(texts)
    return [r + spoiled(t) for r, t in zip(rows, texts, strict=True)]

  fake(monkeypatch, encode)
  monkeypatch.setattr(encoders, '_FIRST_BYTES', 2000)
  encoder = encoders.Encoder(words)
  for start in (0, 333):
    encoder.next_unit()
    ids = encoder(TEXTS[start : start + 9])
    own = words.encode_batch(TEXTS[start : start + 9])
    assert [row.tolist() for row in ids] == [row.tolist() for row in own]
  assert 'other ids' in encoder.line


def test_gigatoken_gives_the_ids_of_tokenizers(words):
  pytest.importorskip('gigatoken', reason='extra [fast] is missing')
  encoder = encoders.Encoder(words)
  special = "<｜end▁of▁sentence｜> quoted, it's\r\n\r\n  12345 日本語 x"
  texts = [*TEXTS, special, special * 3]
  ids, own = encoder(texts), words.encode_batch(texts)
  assert [row.tolist() for row in ids] == [row.tolist() for row in own]
  assert encoder.line.startswith('gigatoken encodes')
