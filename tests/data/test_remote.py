"""A text in a bucket is the text on a disk; its errors are lines."""

import gzip
import json
import pathlib
import threading

import fsspec
import numpy as np
import pytest
from texts import BYTE, documents_of, prepared, rows_of, small

from experiments.data import corpus, documents, identity, remote, sources, units
from mla_moe.config import ConfigError

ROWS = [f'row {i} é' for i in range(400)]


@pytest.fixture
def bucket(tmp_path):
  """The same files in a folder and in a bucket; returns both."""
  folder = tmp_path / 'text'
  folder.mkdir()
  rows_of('jsonl', folder / 'a.jsonl', ROWS)
  rows_of('parquet', folder / 'b.parquet', ROWS[:50])
  content = (folder / 'a.jsonl').read_bytes()
  (folder / 'c.jsonl.gz').write_bytes(gzip.compress(content))
  (folder / 'notes.txt').write_text('a note\n')
  (folder / 'logo.png').write_bytes(b'no text')
  (folder / '.hidden').write_text('a secret\n')
  system = fsspec.filesystem('memory')
  system.put(str(folder), '/bucket/text', recursive=True)
  yield folder, 'memory://bucket/text'
  system.rm('/bucket', recursive=True)


def test_a_bucket_is_the_folder(bucket, tmp_path, monkeypatch):
  """Files, lines, units of ranges, tokens: all but stamps are the same."""
  monkeypatch.setattr(units, '_LEAST_BYTES', 2000)
  names, lines = {}, {}
  for place in map(str, bucket):
    files, left_out = sources.listed(place, 0.2)
    names[place] = [(f.name, f.is_document, f.size) for f in files]
    lines[place] = left_out.replace(place, '')
  assert len({json.dumps(name) for name in names.values()}) == 1
  assert len(set(lines.values())) == 1
  assert '1 hidden (.hidden), 1 of .png' in lines[str(bucket[0])]
  here, there = (
    prepared(small(source=str(place)), tmp_path / f'cache{i}')
    for i, place in enumerate(bucket)
  )
  np.testing.assert_array_equal(here.train, there.train)
  assert here.fingerprint == there.fingerprint
  one = remote.listed(f'{bucket[1]}/a.jsonl')[1]
  assert [path.endswith('bucket/text/a.jsonl') for path, *_ in one] == [True]
  text = prepared(small(source=f'{bucket[1]}/*.jsonl'), tmp_path / 'cache2')
  assert len(documents_of(text.train) + documents_of(text.heldout)) == 400


def test_a_checksum_of_a_bucket_stands_for_the_content(
  bucket, tmp_path, monkeypatch
):
  """Then nothing is read but to be tokenised; another time is no other text."""
  url, system = bucket[1], fsspec.filesystem('memory')
  info = type(system).info
  sums = lambda self, path, **words: (
    info(self, path, **words) | {'md5Hash': path[-3:]}
  )
  find = type(system).find

  def found(self, path, **words):
    facts = find(self, path, **words)
    return {name: sums(self, name) for name in facts}

  monkeypatch.setattr(type(system), 'find', found)
  monkeypatch.setattr(identity, '_RECENT', 0)
  text = prepared(small(source=url), tmp_path / 'cache')
  content = system.cat('/bucket/text/notes.txt')
  system.pipe('/bucket/text/notes.txt', content)
  opened = []
  monkeypatch.setattr(remote, 'opened', opened.append)
  again = corpus.prepare(small(source=url), BYTE, tmp_path / 'cache', print)
  assert again.fingerprint == text.fingerprint and not opened


def test_an_object_that_cannot_be_read_is_one_line(bucket, monkeypatch):
  with pytest.raises(ConfigError, match='no such file or folder'):
    sources.listed('memory://bucket/absent')
  (file, *_) = sources.listed(bucket[1]).files
  fsspec.filesystem('memory').rm('/bucket/text/a.jsonl')
  with pytest.raises(ConfigError, match='a.jsonl: no such bucket or object'):
    list(documents.read(file))
  gone = pytest.raises(ConfigError, match='cannot be read .denied by somebody')

  def denied(*_, **__):
    raise RuntimeError('denied\nby somebody')

  monkeypatch.setattr(fsspec.core, 'url_to_fs', denied)
  with gone:
    sources.listed('memory://bucket')


def test_a_library_that_is_missing_is_named(monkeypatch):
  def absent(*_, **__):
    raise ImportError('no gcsfs')

  monkeypatch.setattr(fsspec.core, 'url_to_fs', absent)
  for scheme, extra in (('gs', 'gcs'), ('s3', 's3')):
    with pytest.raises(ConfigError, match=rf'install "mla_moe\[{extra}\]"'):
      sources.listed(f'{scheme}://bucket/x')


def test_the_hub_s_cache_of_a_data_set_is_its_revision(tmp_path):
  """Its links lead to files without suffixes; other revisions are older."""
  folder = tmp_path / 'datasets--a--b'
  for name in ('old', 'new'):
    (folder / 'snapshots' / name).mkdir(parents=True)
    (folder / 'blobs').mkdir(exist_ok=True)
    rows_of('jsonl', folder / 'blobs' / name, [name] * 99)
    link = folder / 'snapshots' / name / 'rows.jsonl'
    link.symlink_to(pathlib.Path('../../blobs') / name)
  (folder / 'refs').mkdir()
  (folder / 'refs' / 'main').write_text('new')
  (file,) = sources.listed(str(folder)).files
  assert {document.text for document in documents.read(file)} == {'new'}
  assert file.name == 'rows.jsonl'


def test_a_bucket_that_is_silent_is_one_line(bucket, monkeypatch):
  """Its library asks again and again, for minutes."""
  assert remote._PATIENCE <= 20
  released = threading.Event()
  system = type(fsspec.filesystem('memory'))
  with monkeypatch.context() as patch:
    patch.setattr(system, 'info', lambda *_, **__: released.wait())
    patch.setattr(remote, '_PATIENCE', 0.05)
    patch.setattr(remote, '_answered', set())
    for _ in range(2):
      with pytest.raises(ConfigError, match='bucket/text: the service gave no'):
        remote.listed(bucket[1])
    released.set()
  assert remote.listed(bucket[1])[1]


def test_a_bucket_that_has_answered_is_not_asked_again(bucket, monkeypatch):
  """Another one is, and so is one without the name."""
  system, asked = type(fsspec.filesystem('memory')), []
  info = system.info

  def counted(self, path, **words):
    asked.append(path)
    return info(self, path, **words)

  monkeypatch.setattr(remote, '_answered', set())
  monkeypatch.setattr(system, 'info', counted)
  questions = []
  for path in ('other/a', 'other/a', 'bucket/text/a.jsonl', 'bucket/text/b'):
    found = remote.lookup(f'memory://{path}')
    assert bool(found) == path.endswith('a.jsonl')
    questions.append(len(asked))
    asked.clear()
  assert questions == [2, 2, 2, 1]
