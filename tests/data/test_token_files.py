"""Ids as a source: the same rows of each kind of file, mistakes in a line."""

import dataclasses
import os
import threading

import numpy as np
import pytest
from id_files import DOCUMENTS, IDS, KINDS, megatron, write
from texts import BOS, BYTE, prepared, small, write_folder

from experiments.data import batches, corpus, corpus_folder
from mla_moe.config import ConfigError


@pytest.mark.parametrize('kind', KINDS)
def test_each_kind_has_the_same_rows(kind, tmp_path):
  path, changes = write(kind, tmp_path)
  data = small(source=str(path), packing='separate', **changes)
  text = prepared(data, tmp_path / 'cache')
  cut = len(IDS) - round(0.2 * len(IDS))
  np.testing.assert_array_equal(text.train[:], IDS[:cut])
  np.testing.assert_array_equal(text.heldout[:], IDS[cut:])
  ours = batches.batch_at(text.train, data, 3, BOS)
  right = batches.batch_at(IDS[:cut].astype(np.uint16), data, 3, BOS)
  for a, b in zip(ours, right, strict=True):
    np.testing.assert_array_equal(a, b)
  assert text.prompt and text.gzip_bits_per_byte > 0
  assert corpus_folder.verify(text) == len(IDS)


def test_files_of_a_glob_are_one_stream(tmp_path):
  """In order of name, of any types, and cut anywhere."""
  np.save(tmp_path / '1.npy', IDS[:333].astype(np.int64))
  np.save(tmp_path / '2.npy', IDS[333:400].astype(np.uint16))
  np.save(tmp_path / '3.npy', IDS[400:].astype(np.uint64))
  data = small(source=f'{tmp_path}/*.npy')
  text = prepared(data, tmp_path / 'cache')
  both = np.concatenate([text.train[:], text.heldout[:]])
  np.testing.assert_array_equal(both, IDS)
  np.testing.assert_array_equal(text.train[330:437], IDS[330:437])
  assert text.train[330:437].dtype == np.int64


def test_ids_are_read_once_and_known_by_their_content(tmp_path):
  """A start that reads nothing; other ids are another text."""
  path, _ = write('bin', tmp_path)
  data, lines = small(source=str(path)), []
  load = lambda known='': corpus.prepare(
    data, BYTE, tmp_path / 'cache', lines.append, known
  )
  text = load()
  assert load(text.fingerprint).fingerprint == text.fingerprint
  assert len(lines) == 1
  copy = tmp_path / 'copy.bin'
  copy.write_bytes(path.read_bytes())
  other = dataclasses.replace(data, source=str(copy))
  assert prepared(other, tmp_path / 'cache').fingerprint == text.fingerprint
  path.write_bytes(IDS[::-1].astype('<u2').tobytes())
  with pytest.raises(ConfigError, match='the ids have changed since the run'):
    load(text.fingerprint)


def test_damage_after_the_first_start_is_found_when_it_is_touched(tmp_path):
  path, _ = write('npy', tmp_path)
  data = small(source=str(path))
  prepared(data, tmp_path / 'cache')
  state, content = path.stat(), bytearray(path.read_bytes())
  content[-300] ^= 1
  path.write_bytes(content)
  os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
  text = prepared(data, tmp_path / 'cache')
  with pytest.raises(ConfigError, match='ids.npy: MiB 0 is damaged') as error:
    batches.batch_at(text.train, data, 0, BOS)
  assert 'delete' not in str(error.value)  # the folder is not ours


@pytest.mark.parametrize('kind', ['npy', 'parquet'])
def test_ids_stay_when_the_cache_or_the_working_folder_moves(
  tmp_path, monkeypatch, kind
):
  path, _ = write(kind, tmp_path)
  data = small(source=str(path))
  monkeypatch.chdir(tmp_path)
  near = dataclasses.replace(data, source=path.name)
  text = corpus.prepare(near, BYTE, 'cache', print)
  os.rename('cache', 'moved')
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  monkeypatch.chdir(elsewhere)
  lines = []
  again = corpus.prepare(data, BYTE, '../moved', lines.append, text.fingerprint)
  assert again.fingerprint == text.fingerprint and not lines
  assert corpus_folder.verify(again) == len(IDS)


def test_an_index_that_comes_later_is_read(tmp_path):
  path, _ = write('bin', tmp_path)
  data = small(source=str(path))
  prepared(data, tmp_path / 'cache')
  path.with_suffix('.idx').write_bytes(b'nonsense')
  with pytest.raises(ConfigError, match='is no index of Megatron'):
    prepared(data, tmp_path / 'cache')


def test_ids_are_read_by_one_process_at_a_time(tmp_path):
  """The second waits, and takes what the first has written."""
  path = megatron(tmp_path / 'a.bin', DOCUMENTS)
  data, cache = small(source=str(path), packing='separate'), tmp_path / 'cache'
  lines, waits = [[], []], threading.Event()

  def load(number, said):
    text = corpus.prepare(data, BYTE, cache, said)
    np.testing.assert_array_equal(text.train[:9], IDS[:9])
    assert text.train.begins(slice(9)).tolist() == [True] + 8 * [False]
    return number

  def first(line):
    lines[0].append(line)
    thread.start()
    assert waits.wait(60)

  def second(line):
    lines[1].append(line)
    waits.set()

  thread = threading.Thread(target=load, args=(1, second))
  load(0, first)
  thread.join(60)
  assert 'Reading the ids' in lines[0][0]
  assert len(lines[1]) == 1 and 'Another process' in lines[1][0]


def test_a_damaged_record_of_ids_is_one_line(tmp_path):
  path, _ = write('bin', tmp_path)
  data = small(source=str(path))
  prepared(data, tmp_path / 'cache')
  (record,) = tmp_path.glob('cache/*/ids.json')
  record.write_text(record.read_text()[:99])
  with pytest.raises(ConfigError, match='ids.json: is damaged; delete'):
    prepared(data, tmp_path / 'cache')


def test_a_share_passes_over_ids(tmp_path):
  """They need no tokenising, and a mixture may have text beside them."""
  path, _ = write('bin', tmp_path)
  text = prepared(small(source=write_folder(tmp_path / 'text')), tmp_path / 'a')
  for source in (path, tmp_path / 'a' / text.fingerprint):
    lines, data = [], small(source=str(source))
    corpus.prepare_share(data, BYTE, tmp_path / 'cache', (0, 2), lines.append)
    assert lines == [f'{str(source)!r} has ids: there is nothing to tokenise.']


@pytest.mark.parametrize('facts', ['{}', '[]', '{"checksums": 3}', '{"a'])
def test_facts_without_checksums_are_one_line(tmp_path, facts):
  source = write_folder(tmp_path / 'text')
  text = prepared(small(source=source), tmp_path / 'a')
  folder = tmp_path / 'a' / text.fingerprint
  (folder / '00000.json').write_text(facts)
  again = prepared(small(source=str(folder)), tmp_path / 'b')
  with pytest.raises(ConfigError, match='00000.json: is damaged') as error:
    again.train[:9]
  assert str(error.value).endswith(corpus._REMEDY)


def _flip(path):
  content = bytearray(path.read_bytes())
  content[-9] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  ('name', 'harm'),
  [
    ('corpus.json', _flip),
    ('corpus.json', lambda path: path.write_text('{}')),
    ('00000.train', _flip),
    ('00000.train', lambda path: path.unlink()),
    ('00000.heldout', lambda path: path.write_bytes(b'cut')),
    ('00000.json', lambda path: path.unlink()),
  ],
)
def test_damage_of_a_user_s_shards_is_not_ours_to_delete(name, harm, tmp_path):
  """Of the tokens in the run's own cache deletion is the way out."""
  text = prepared(small(source=write_folder(tmp_path / 'text')), tmp_path / 'a')
  folder = tmp_path / 'a' / text.fingerprint
  harm(folder / name)

  def read(source, cache):
    with pytest.raises(ConfigError, match=name) as error:
      corpus_folder.verify(prepared(small(source=str(source)), cache))
    return str(error.value)

  assert 'delete' not in (line := read(folder, tmp_path / 'b'))
  assert line.endswith(corpus._REMEDY) and str(folder / name) in line
  line = read(tmp_path / 'text', tmp_path / 'a')
  assert f'delete {folder} and start again' in line


def test_renamed_shards_are_known_by_their_content(tmp_path):
  """Not by their name: other shards under it are not the run's."""
  data = small(source=str(tmp_path / 'tokens'))
  names = []
  for count in (40, 50):
    folder = write_folder(tmp_path / f'text{count}', count)
    text = prepared(small(source=folder), tmp_path / 'a')
    names.append(tmp_path / 'a' / text.fingerprint)
  os.rename(names[0], data.source)
  first = prepared(data, tmp_path / 'b')
  os.rename(data.source, tmp_path / 'other')
  other = dataclasses.replace(data, source=str(tmp_path / 'other'))
  assert prepared(other, tmp_path / 'b').fingerprint == first.fingerprint
  os.rename(names[1], data.source)
  with pytest.raises(ConfigError, match='are of another text than the run'):
    corpus.prepare(data, BYTE, tmp_path / 'b', print, first.fingerprint)


def test_shards_of_another_place_are_a_source(tmp_path):
  text = prepared(small(source=write_folder(tmp_path / 'text')), tmp_path / 'a')
  folder = tmp_path / 'a' / text.fingerprint
  data = small(source=str(folder))
  again = prepared(data, tmp_path / 'b')
  assert again.fingerprint == text.fingerprint and not (tmp_path / 'b').exists()
  np.testing.assert_array_equal(again.train[:], text.train[:])
  wrong = dataclasses.replace(BYTE, fingerprint='another')
  with pytest.raises(ConfigError, match='are of another tokenizer'):
    prepared(data, tmp_path / 'b', wrong)


def test_mistakes_are_one_line(tmp_path):
  """Each names the file and the fix."""
  ids = lambda values, dtype='<u2': np.array(values, dtype).tobytes()
  cases = {
    'large.bin': (ids([1, BYTE.vocab] * 99), f'has the id {BYTE.vocab}'),
    'odd.bin': (ids([1]) + b'a', 'no whole number of uint16; set data.dtype'),
    'empty.bin': (b'', 'holds no ids'),
    'text.npy': (b'text', 'not a readable .npy'),
    'text.arrow': (b'text', 'not a readable table of ids'),
    'none.bin': (ids([1] * 99), 'begins with bos_id=256'),
  }
  for name, (content, words) in cases.items():
    if name.endswith('arrow'):
      pytest.importorskip('pyarrow', reason='extra [data] is missing')
    (tmp_path / name).write_bytes(content)
    data = small(source=str(tmp_path / name), packing='separate')
    with pytest.raises(ConfigError, match=words) as error:
      prepared(data, tmp_path / 'cache')
    assert '\n' not in str(error.value) and name in str(error.value)
  np.save(tmp_path / 'float.npy', np.ones(9))
  np.save(tmp_path / 'negative.npy', -np.ones(99, np.int32))
  np.save(tmp_path / 'long.npy', np.ones(99, np.int32))
  with open(tmp_path / 'long.npy', 'ab') as file:
    file.write(b'more')
  mistakes = ('float', 'are integers'), ('negative', 'the id -1')
  for name, words in (*mistakes, ('long', 'has 4 bytes after its ids')):
    with pytest.raises(ConfigError, match=words):
      prepared(small(source=f'{tmp_path}/{name}.npy'), tmp_path / 'cache')
  path = megatron(tmp_path / 'cut.bin', DOCUMENTS)
  path.write_bytes(path.read_bytes()[:-2])
  with pytest.raises(ConfigError, match='cut.idx: .* or one is cut'):
    prepared(small(source=str(path)), tmp_path / 'cache')
  path.with_suffix('.idx').write_bytes(b'nonsense')
  with pytest.raises(ConfigError, match='is no index of Megatron'):
    prepared(small(source=str(path)), tmp_path / 'cache')
