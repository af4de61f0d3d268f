"""Ids in a bucket are those on a disk, read once and in chunks."""

import dataclasses
import json
import mmap
import os
import shutil
import threading

import fsspec
import numpy as np
import pytest
from id_files import DOCUMENTS, IDS, KINDS, megatron, write
from texts import BOS, BYTE, prepared, small, write_folder

from experiments import cli
from experiments.data import (
  batches,
  blend,
  bucket_shards,
  chunks,
  corpus,
  corpus_folder,
  id_layouts,
  remote,
  shards,
  token_files,
)
from mla_moe.config import ConfigError

URL = 'memory://tokens'


@pytest.fixture
def bucket(monkeypatch):
  """A bucket, chunks of 128 bytes, and the parts of objects that are read."""
  monkeypatch.setattr(chunks, 'CHUNK', 128)
  monkeypatch.setattr(shards, 'BLOCK', 64)
  system, reads = fsspec.filesystem('memory'), []
  part = remote.part

  def counted(path, start, stop):
    reads.append((path.rpartition('/')[2], start, stop))
    return part(path, start, stop)

  monkeypatch.setattr(remote, 'part', counted)
  yield system, reads
  if system.exists('/tokens'):
    system.rm('/tokens', recursive=True)


def put(system, folder, target='/tokens'):
  system.put(str(folder), target, recursive=True)


@pytest.mark.parametrize('kind', KINDS)
def test_each_kind_has_the_rows_that_it_has_on_a_disk(kind, bucket, tmp_path):
  system, _ = bucket
  (tmp_path / 'ids').mkdir()
  path, changes = write(kind, tmp_path / 'ids')
  put(system, tmp_path / 'ids')
  there = small(source=f'{URL}/{path.name}', packing='separate', **changes)
  here = dataclasses.replace(there, source=str(path))
  one = prepared(there, tmp_path / 'cache')
  other = prepared(here, tmp_path / 'cache')
  for step in (0, 7):
    ours = batches.batch_at(one.train, there, step, BOS)
    right = batches.batch_at(other.train, here, step, BOS)
    for a, b in zip(ours, right, strict=True):
      np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(one.heldout[:], other.heldout[:])
  assert one.prompt == other.prompt
  assert one.gzip_bits_per_byte == other.gzip_bits_per_byte
  assert corpus_folder.verify(one) == len(IDS)
  assert len(one.train[5:5]) == 0


def test_a_chunk_is_read_once_and_by_its_own_rows(
  bucket, tmp_path, monkeypatch
):
  """Later starts find it on the disk; one that is damaged is read again."""
  system, reads = bucket
  system.pipe('/tokens/a.bin', IDS.astype('<u2').tobytes())
  data, cache = small(source=f'{URL}/*.bin'), tmp_path / 'cache'
  text = prepared(data, cache)
  first = prepared(data, cache)
  reads.clear()
  np.testing.assert_array_equal(first.train[60:70], IDS[60:70])
  assert reads == [('a.bin', 0, 128), ('a.bin', 128, 256)]
  np.testing.assert_array_equal(text.train[:200], IDS[:200])
  np.testing.assert_array_equal(first.train[0:130], IDS[0:130])
  assert len(reads) == 4
  (folder,) = cache.glob('chunks-*')
  path = folder / '0000001'
  content = bytearray(path.read_bytes())
  for harm in (content[:9], b'', bytes([content[0] ^ 1]) + content[1:]):
    path.write_bytes(harm)
    again = prepared(data, cache)
    reads.clear()
    np.testing.assert_array_equal(again.train[:200], IDS[:200])
    assert reads == [('a.bin', 128, 256)]
    assert path.read_bytes() == content

  def refused(*_, **__):
    raise PermissionError(13, 'Permission denied')

  # The cache of another user is read; the time of the opening is not changed.
  monkeypatch.setattr(os, 'utime', refused)
  again = prepared(data, cache)
  reads.clear()
  np.testing.assert_array_equal(again.train[:200], IDS[:200])
  assert not reads


def test_a_start_reads_no_id_but_of_the_sample(bucket, tmp_path, monkeypatch):
  monkeypatch.setattr(token_files, '_SAMPLE', 9)
  system, reads = bucket
  system.pipe('/tokens/a.bin', IDS.astype('<u2').tobytes())
  lines = []
  data = small(source=f'{URL}/a.bin')
  text = corpus.prepare(data, BYTE, tmp_path / 'cache', lines.append)
  assert len(reads) == 1
  assert 'with data.block_rows=8 ' in lines[1]
  again = corpus.prepare(
    data, BYTE, tmp_path / 'cache', lines.append, text.fingerprint
  )
  assert len(reads) == 1 and len(lines) == 2
  assert again.fingerprint == text.fingerprint
  rows = dataclasses.replace(data, block_rows=8, batch_size=16)
  reads.clear()
  batches.batch_at(again.train, rows, 0, BOS)
  assert len({*reads}) == len(reads) <= 16
  system.pipe('/tokens/a.bin', IDS[::-1].astype('<u2').tobytes())
  with pytest.raises(ConfigError, match='the ids have changed since the run'):
    corpus.prepare(data, BYTE, tmp_path / 'cache', str, text.fingerprint)


def test_a_full_disk_loses_the_chunks_opened_the_longest_ago(
  bucket, tmp_path, monkeypatch
):
  """Or stores none: the ids are the same."""
  system, reads = bucket
  system.pipe('/tokens/a.bin', IDS.astype('<u2').tobytes())
  data, cache = small(source=f'{URL}/a.bin'), tmp_path / 'cache'
  text = prepared(data, cache)
  np.testing.assert_array_equal(text.train[:600], IDS[:600])
  (folder,) = cache.glob('chunks-*')
  paths = sorted(folder.iterdir())
  for age, path in enumerate(paths):
    os.utime(path, ns=(age, age))
  usage = type(shutil.disk_usage(cache))(100 * 132, 0, 0)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  chunks._make_room(cache)
  rest = sorted(folder.iterdir())
  # A twentieth and more of the disk, in files of 132 bytes.
  assert rest == paths[6:]
  for number in (0, 1):
    np.testing.assert_array_equal(
      prepared(data, cache).train[64 * number :][:9], IDS[64 * number :][:9]
    )

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(shutil, 'disk_usage', full)
  shutil.rmtree(folder)
  again = prepared(data, cache)
  reads.clear()
  np.testing.assert_array_equal(again.train[:600], IDS[:600])
  np.testing.assert_array_equal(again.train[:600], IDS[:600])
  assert len(reads) == len({*reads}) == 10 and not [*folder.iterdir()]


def test_few_chunks_of_all_objects_are_open(bucket, tmp_path, monkeypatch):
  """They are maps, not bytes, from the first touch on."""
  monkeypatch.setattr(chunks, '_OPEN', 3)
  chunks._maps.cache_clear()
  system, reads = bucket
  for name in 'ab':
    system.pipe(f'/tokens/{name}.bin', IDS.astype('<u2').tobytes())
  text = prepared(small(source=f'{URL}/*.bin'), tmp_path / 'cache')
  objects = text.train._tokens._shards
  maps = chunks._maps()
  size = len(IDS)
  for _ in range(2):
    for place in (slice(size), slice(size - 70, size + 70)):
      right = np.concatenate([IDS, IDS])[place]
      np.testing.assert_array_equal(text.train[place], right)
      assert len(maps) == 3
      assert all(isinstance(x.base.obj, mmap.mmap) for x in maps.values())
  assert {x for x, _ in maps} == {*objects}
  assert len(reads) == len({*reads})


def test_an_index_is_listed_once_for_a_glob(bucket, tmp_path, monkeypatch):
  """The questions of a start are as many for two files as for six."""
  system, _ = bucket
  own, asked, counts = type(system), [], []
  info = own.info

  def counted(self, path, **words):
    asked.append(path)
    return info(self, path, **words)

  monkeypatch.setattr(remote, '_answered', set())
  monkeypatch.setattr(own, 'info', counted)
  monkeypatch.setattr(remote, 'lookup', None)
  for files in (2, 6):
    for number in range(files):
      path = megatron(tmp_path / f'{number}.bin', DOCUMENTS[number:][:3])
      for part in (path, path.with_suffix('.idx')):
        system.pipe(f'/tokens/{part.name}', part.read_bytes())
    system.pipe('/tokens/raw.bin', IDS[:9].astype('<u2').tobytes())
    objects = token_files.files(f'{URL}/*.bin')
    indices = id_layouts.indices(f'{URL}/*.bin', [x.path for x in objects])
    names = [x and x.path.rpartition('/')[2] for x in indices]
    assert names == [*(f'{i}.idx' for i in range(files)), None]
    counts.append(len(asked))
    asked.clear()
  assert counts[0] >= counts[1]


def test_the_first_table_of_a_glob_decides(bucket, tmp_path, monkeypatch):
  """A start opens one object, however many there are."""
  system, _ = bucket
  path, _ = write('parquet', tmp_path)
  for name in 'abc':
    system.pipe(f'/tokens/{name}.parquet', path.read_bytes())
  tables, source = [], f'{URL}/*.parquet'
  opened = remote.opened

  def counted(name):
    tables.append(name[-9:])
    return opened(name)

  monkeypatch.setattr(remote, 'opened', counted)
  assert len(token_files.files(source)) == 3
  assert not token_files.files(source, 'input_ids')
  assert tables == ['a.parquet'] * 2


def test_checksums_of_a_hundred_shards_are_read_once(bucket, tmp_path):
  """Rows come from all of them in turn."""
  system, reads = bucket
  text = prepared(small(source=write_folder(tmp_path / 'text')), tmp_path / 'a')
  folder = tmp_path / 'a' / text.fingerprint
  values = json.loads((folder / 'corpus.json').read_text())
  lengths = {name: 100 * x for name, x in values['lengths'].items()}
  values['lengths'] = lengths
  values['check'] = corpus_folder.checksum(values)
  system.pipe('/tokens/corpus.json', json.dumps(values).encode())
  for number in range(100):
    for part in ('train', 'heldout', 'json'):
      content = (folder / f'00000.{part}').read_bytes()
      system.pipe(f'/tokens/{number:05}.{part}', content)
  ours = prepared(small(source=URL), tmp_path / 'b').train
  length, right = len(text.train), text.train[:]
  for first in (0, 64):
    for start in range(first, 100 * length, length):
      row = ours[start : start + 64]
      np.testing.assert_array_equal(row, right[first : first + 64])
  names = [name for name, *_ in reads]
  assert len(names) == len({*reads}) == 1 + 100 + 200
  file = remote.lookup(f'{URL}/00000.json')
  assert bucket_shards._sums(file)['train'].itemsize == 4


def test_shards_in_a_bucket_are_a_source(bucket, tmp_path):
  """They are the same text as on the disk from which they were copied."""
  system, reads = bucket
  text = prepared(small(source=write_folder(tmp_path / 'text')), tmp_path / 'a')
  folder, name = tmp_path / 'a' / text.fingerprint, text.fingerprint
  for target in (f'/tokens/{name}', '/tokens/words'):
    put(system, folder, target)
  data, cache = small(source=f'{URL}/{name}/'), tmp_path / 'b'
  ours = prepared(data, cache)
  assert ours.fingerprint == text.fingerprint and ours.facts == text.facts
  assert [x[0] for x in reads] == ['corpus.json']
  for part in ('train', 'heldout'):
    right = np.asarray(getattr(text, part))
    np.testing.assert_array_equal(np.asarray(getattr(ours, part)), right)
  assert [x[0] for x in reads].count('00000.json') == 1
  lines = []
  corpus.prepare_share(data, BYTE, cache, (0, 2), lines.append)
  assert 'there is nothing to tokenise' in lines[0]
  wrong = dataclasses.replace(BYTE, fingerprint='another')
  with pytest.raises(ConfigError, match='are of another tokenizer'):
    prepared(data, cache, wrong)
  renamed = dataclasses.replace(data, source=f'{URL}/words')
  assert prepared(renamed, cache).fingerprint != text.fingerprint


@pytest.mark.parametrize(
  ('name', 'content', 'words'),
  [
    ('00000.train', 'flip', '00000.train: MiB 0 is damaged .from byte'),
    ('00000.train', b'cut', '00000.train: has 3 bytes, not'),
    ('00000.heldout', None, '00000.heldout: has 0 bytes, not'),
    ('00000.json', b'{}', '00000.json: is damaged'),
    ('00000.json', None, 'the facts of .*00000.train: is damaged'),
    ('corpus.json', b'{"lengths"', 'corpus.json: is damaged'),
    ('corpus.json', 'flip', 'corpus.json: is damaged'),
  ],
)
def test_damage_in_a_bucket_is_named(name, content, words, bucket, tmp_path):
  system, _ = bucket
  text = prepared(small(source=write_folder(tmp_path / 'text')), tmp_path / 'a')
  put(system, tmp_path / 'a' / text.fingerprint)
  if content is None:
    system.rm(f'/tokens/{name}')
  elif content == 'flip':
    right = bytearray(system.cat(f'/tokens/{name}'))
    right[-9] ^= 1
    system.pipe(f'/tokens/{name}', bytes(right))
  else:
    system.pipe(f'/tokens/{name}', content)
  with pytest.raises(ConfigError, match=words) as error:
    corpus_folder.verify(prepared(small(source=URL), tmp_path / 'b'))
  line = str(error.value)
  assert line.endswith(bucket_shards.REMEDY) and '\n' not in line


def test_mistakes_in_a_bucket_are_one_line(bucket, tmp_path):
  """Ids that the tokenizer lacks are found with their chunk."""
  system, _ = bucket
  large = np.where(np.arange(len(IDS)) == 300, BYTE.vocab, IDS)
  system.pipe('/tokens/large.bin', large.astype('<u2').tobytes())
  text = prepared(small(source=f'{URL}/large.bin'), tmp_path / 'cache')
  np.testing.assert_array_equal(text.train[:192], IDS[:192])
  with pytest.raises(ConfigError, match=f'large.bin: has the id {BYTE.vocab}'):
    text.train[300:301]
  cases = {
    'odd.bin': (b'abc', 'no whole number of uint16'),
    'empty.bin': (b'', 'holds no ids'),
    'text.npy': (b'text', 'not a readable .npy'),
  }
  for name, (content, words) in cases.items():
    system.pipe(f'/tokens/{name}', content)
    with pytest.raises(ConfigError, match=words):
      prepared(small(source=f'{URL}/{name}'), tmp_path / 'cache')
  with pytest.raises(ConfigError, match='no such file or folder'):
    prepared(small(source=f'{URL}/absent.bin'), tmp_path / 'cache')
  text = prepared(small(source=f'{URL}/large.bin'), tmp_path / 'other')
  system.pipe('/tokens/large.bin', b'ab')
  with pytest.raises(ConfigError, match='large.bin: ends before byte'):
    text.train[:9]


def test_a_bucket_that_fails_while_a_run_trains_stops_it(
  bucket, tmp_path, monkeypatch
):
  """As a run that may go on, with exit code 1, and not as a user's mistake."""
  system, reads = bucket
  system.pipe('/tokens/a.bin', IDS.astype('<u2').tobytes())
  text = prepared(small(source=f'{URL}/a.bin'), tmp_path / 'cache')
  text.train[:9]

  def gone(*_, **__):
    raise RuntimeError('503\nof the service')

  with monkeypatch.context() as patch:
    patch.setattr(type(system), 'cat_file', gone)
    text.train[:9]  # it is here
    line = 'a.bin: cannot be read .503 of the service'
    with pytest.raises(cli.Stopped, match=line):
      text.train[300:309]
  np.testing.assert_array_equal(text.train[300:309], IDS[300:309])


def test_a_service_without_an_answer_is_no_hour(bucket, monkeypatch):
  """Each first question of a start waits for seconds alone."""
  system, _ = bucket
  system.pipe('/tokens/a.bin', IDS.astype('<u2').tobytes())
  asked = threading.Event()
  with monkeypatch.context() as patch:
    patch.setattr(remote, '_PATIENCE', 0.05)
    patch.setattr(remote, '_answered', set())
    patch.setattr(type(system), 'info', lambda *_, **__: asked.wait(60))
    for ask in (remote.lookup, remote.listed, corpus.has_ids):
      with pytest.raises(ConfigError, match='gave no answer for'):
        ask(f'{URL}/a.bin' if ask is not corpus.has_ids else URL)
    asked.set()


OWN = [[i * 7 % 250 + n % 5 for n in range(9 + i)] for i in range(40)]


def test_megatron_s_documents_end_where_its_index_says(bucket, tmp_path):
  """Without a bos, and where bos is eos; as the same text with bos has them."""
  system, _ = bucket
  words = dataclasses.replace(BYTE, eos_id=BOS)
  folder = tmp_path / 'ids'
  folder.mkdir()
  path = megatron(folder / 'a.bin', OWN)
  megatron(folder / 'b.bin', OWN[:7], 'int32', 4)
  put(system, folder)
  ids = np.concatenate(OWN + OWN[:7])
  lengths = [len(x) for x in OWN + OWN[:7]]
  starts = np.isin(np.arange(len(ids)), np.cumsum([0, *lengths[:-1]]))
  cut = len(ids) - round(0.2 * len(ids))
  for source in (f'{folder}/*.bin', f'{URL}/*.bin'):
    data = small(source=source, packing='separate')
    text = prepared(data, tmp_path / 'cache', words)
    for part, place in (('train', slice(cut)), ('heldout', slice(cut, None))):
      stream = getattr(text, part)
      np.testing.assert_array_equal(stream.begins(slice(None)), starts[place])
    whole = blend.whole(text, data)
    np.testing.assert_array_equal(whole.begins(slice(3, None)), starts[3:])
    ours = batches.batch_at(text.train, data, 2, BOS)
    marked = np.where(starts, BOS, ids)[:cut]
    right = batches.batch_at(marked, data, 2, BOS)
    np.testing.assert_array_equal(ours.segments, right.segments)
    np.testing.assert_array_equal(ours.targets < 0, right.targets < 0)
  path.with_suffix('.idx').unlink()
  data = small(source=f'{folder}/*.bin', packing='separate')
  with pytest.raises(ConfigError, match="use 'joined', or Megatron's .idx"):
    prepared(data, tmp_path / 'cache')


def test_an_index_with_documents_of_several_sequences(tmp_path):
  """Only its documents begin segments; places outside the ids are damage."""
  path = megatron(tmp_path / 'a.bin', DOCUMENTS)
  index = path.with_suffix('.idx')
  content = bytearray(index.read_bytes())
  head, rest = content[:34], content[34 : 34 + 12 * 40]
  head[26:34] = np.array([4], '<u8').tobytes()
  firsts = np.array([0, 3, 20, 40], '<i8').tobytes()
  index.write_bytes(bytes(head + rest) + firsts)
  data = small(source=str(path), packing='separate', heldout=1e-9)
  text = prepared(data, tmp_path / 'cache')
  lengths = np.cumsum([0, *map(len, DOCUMENTS)])
  right = lengths[[0, 3, 20]].tolist()
  marks = text.train.begins(slice(None))
  assert np.flatnonzero(marks).tolist() == right
  rest[4 * 40 : 4 * 40 + 8] = np.array([10**9], '<i8').tobytes()
  index.write_bytes(bytes(head + rest) + firsts)
  with pytest.raises(ConfigError, match='a.idx: is damaged .it has places'):
    prepared(data, tmp_path / 'cache')
  index.write_bytes(bytes(head + rest))
  with pytest.raises(ConfigError, match='ends within its 40 lengths and 4 doc'):
    prepared(data, tmp_path / 'cache')


def test_the_name_of_a_chunk_s_folder_is_of_its_object():
  file = remote.Object('gs://a/b', 3, 'crc32c=1')
  names = [
    chunks.name_of(x)
    for x in (file, file._replace(stamp='crc32c=2'), file._replace(size=4))
  ]
  assert len({*names}) == 3
