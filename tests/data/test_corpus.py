"""Token files: written once, checked when opened; FIM loses no character."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import stat
import zlib

import children
import numpy as np
import pytest
from preparing import outcome
from texts import (
  BEGIN,
  BOS,
  BYTE,
  END,
  EOS,
  HOLE,
  documents_of,
  prepared,
  rows_of,
  small,
  write_folder,
)

from experiments.data import (
  batches,
  corpus,
  corpus_folder,
  documents,
  identity,
  shards,
  sources,
  tokenizer,
)
from mla_moe.config import ConfigError


def test_a_second_call_reuses_the_files_in_silence(folder, tmp_path, text):
  path = tmp_path / 'cache' / text.fingerprint
  before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
  lines = []
  config = small(source=folder, seq_len=4, packing='separate')
  again = corpus.prepare(config, BYTE, tmp_path / 'cache', lines.append)
  assert not lines and again.fingerprint == text.fingerprint
  assert before == {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
  np.testing.assert_array_equal(again.train, text.train)
  assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize(
  'change', [dict(seed=1), dict(heldout=0.3), dict(fim_rate=0.5)]
)
def test_what_changes_the_tokens_changes_the_fingerprint(
  change, folder, tmp_path, text
):
  config = small(source=folder, **change)
  other = prepared(config, tmp_path / 'cache')
  assert other.fingerprint != text.fingerprint


def test_a_source_that_moved_is_the_same(folder, tmp_path, text):
  """A path stands for its content; a file's name counts where it is a key."""
  moved, cache, lines = tmp_path / 'moved', tmp_path / 'cache', []
  os.rename(folder, moved)
  for source in (moved, moved / '*.txt', os.path.relpath(moved)):
    again = corpus.prepare(small(source=str(source)), BYTE, cache, lines.append)
    assert again.fingerprint == text.fingerprint and not lines
  os.rename(moved / '00.txt', moved / 'renamed.txt')
  renamed = prepared(small(source=str(moved)), cache)
  assert renamed.fingerprint != text.fingerprint
  one, two = tmp_path / 'one.txt', tmp_path / 'two.md'
  one.write_text('a book\n' * 99)
  book = prepared(small(source=str(one)), cache)
  os.rename(one, two)
  assert prepared(small(source=str(two)), cache).fingerprint == book.fingerprint
  os.rename(two, tmp_path / 'two.jsonl')
  (tmp_path / 'two.jsonl').write_text('{"text": "a book"}\n' * 99)
  rows = prepared(small(source=str(tmp_path / 'two.jsonl')), cache)
  assert rows.fingerprint != book.fingerprint


def test_a_run_goes_on_with_its_tokens_when_the_text_is_gone(
  folder, tmp_path, text
):
  """Its tokens have checksums; another text in its place is refused."""
  cache, lines = tmp_path / 'cache', []
  config = small(source=folder)
  again = lambda known: corpus.prepare(
    config, BYTE, cache, lines.append, known=known
  )
  assert again(text.fingerprint).fingerprint == text.fingerprint and not lines
  moved = tmp_path / 'elsewhere'
  os.rename(folder, moved)
  gone = again(text.fingerprint)
  np.testing.assert_array_equal(gone.train, text.train)
  assert gone.fingerprint == text.fingerprint
  (line,) = lines
  assert (
    'no such file' in line and f'goes on with its tokens in {cache}' in line
  )
  for known in ('', '0' * 24):
    with pytest.raises(ConfigError, match='no such file') as error:
      again(known)
    # The line of a run that goes on elsewhere says which folder it needs.
    assert (f'bring cache/{known}' in str(error.value)) == bool(known)
  os.mkdir(folder)  # a disk that was cleaned
  assert again(text.fingerprint).fingerprint == text.fingerprint
  (pathlib.Path(folder) / 'a.txt').write_text('another text\n' * 99)
  with pytest.raises(ConfigError, match='the text has changed since the run'):
    again(text.fingerprint)
  assert os.listdir(cache) == [text.fingerprint]  # nothing was tokenised


def _rewrite_as_older(folder, target):
  """Writes a corpus as it was before there were shards."""
  facts = json.loads((folder / 'corpus.json').read_text())
  target.mkdir()
  checksums = {}
  for part in ('train', 'heldout'):
    content = (folder / f'00000.{part}').read_bytes()
    (target / f'{part}.bin').write_bytes(content)
    checksums[part] = [zlib.crc32(content)]
  names = ('dtype', 'gzip_bits_per_byte', 'prompt')
  facts = {name: facts[name] for name in names} | {'checksums': checksums}
  (target / 'corpus.json').write_text(json.dumps(facts))


def test_token_files_of_an_older_version_are_read(folder, tmp_path, text):
  """Of format 1: names of all files, a file above 1 MiB in pieces."""
  (pathlib.Path(folder) / 'more.txt.gz').write_bytes(b'not known then')
  cache = tmp_path / 'cache'
  facts = dict(
    format=1,
    files=[
      (path.name, True, hashlib.sha256(path.read_bytes()).hexdigest())
      for path in sorted(pathlib.Path(folder).glob('*.txt'))
    ],
    tokenizer='byte',
    ids=(256, 257, (258, 259, 260)),
    options=(0.0, 0.2, 0),
  )
  old = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
  _rewrite_as_older(cache / text.fingerprint, cache / old)
  config = small(source=folder)
  again = corpus.prepare(config, BYTE, cache, print, known=old)
  assert again.fingerprint == old
  np.testing.assert_array_equal(again.train, text.train)
  (cache / old / 'train.bin').write_bytes(b'x' * 2 * len(text.train))
  damaged = corpus.prepare(config, BYTE, cache, print, known=old)
  with pytest.raises(ConfigError, match='train.bin: MiB 0 is damaged'):
    damaged.train[:9]
  (pathlib.Path(folder) / '00.txt').write_text('another text')
  with pytest.raises(ConfigError, match='the text has changed since the run'):
    corpus.prepare(config, BYTE, cache, print, known=old)


@pytest.mark.skipif(
  not os.path.exists('/proc/self/smaps'), reason='no Linux: no smaps'
)
def test_rows_are_read_without_read_ahead(text, tmp_path):
  """The system knows that the mapping is read at random (flag rr)."""
  ids = text.train[:9]
  maps = pathlib.Path('/proc/self/smaps').read_text('utf-8')
  path = str(tmp_path / 'cache' / text.fingerprint / '00000.train')
  flags = maps.partition(path)[2].partition('VmFlags:')[2].splitlines()[0]
  assert 'rr' in flags.split()
  assert not ids.flags.writeable


@pytest.mark.parametrize('part', ['train', 'heldout'])
def test_row20_a_flipped_bit_is_found_and_named(part, folder, tmp_path, text):
  """Before its tokens are in a batch; a start reads none of them."""
  path = tmp_path / 'cache' / text.fingerprint / f'00000.{part}'
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)
  config = small(source=folder)
  again = corpus.prepare(config, BYTE, tmp_path / 'cache', print)
  damage = rf'00000\.{part}: MiB 0 is damaged'
  with pytest.raises(ConfigError, match=damage):
    corpus_folder.verify(again)
  with pytest.raises(ConfigError, match=damage):
    if part == 'train':
      batches.batch_at(again.train, config, 0, BOS)
    else:
      batches.eval_batches(again.heldout, config, BOS, 1)


def test_row20_a_file_that_was_cut_or_changed_is_found(folder, tmp_path, text):
  path, cache = tmp_path / 'cache' / text.fingerprint, tmp_path / 'cache'
  again = lambda: corpus.prepare(small(source=folder), BYTE, cache, print)
  shard, facts = path / '00000.train', path / 'corpus.json'
  content, record = shard.read_bytes(), facts.read_text()
  shard.write_bytes(content[:-2])
  with pytest.raises(ConfigError, match='00000.train: has .* bytes, not'):
    again()
  shard.unlink()
  with pytest.raises(ConfigError, match='00000.train: is missing'):
    again()
  shard.write_bytes(content)
  length = f'{text.facts["text_bytes"]}'
  for damaged in (record[:-3], record.replace(length, '9' * len(length)), '{}'):
    facts.write_text(damaged)
    with pytest.raises(ConfigError, match='corpus.json: is damaged'):
      again()
  facts.write_text(record)
  assert again().facts == text.facts


def test_the_damaged_block_of_several_is_the_one_named(tmp_path, monkeypatch):
  """Rows of the others are read, however often."""
  monkeypatch.setattr(shards, 'BLOCK', 64)
  source = write_folder(tmp_path / 'text')
  config, cache = small(source=source), tmp_path / 'cache'
  text = prepared(config, cache)
  path = cache / text.fingerprint / '00000.train'
  content = bytearray(path.read_bytes())
  content[64 * 5 + 1] ^= 1
  path.write_bytes(content)
  again = corpus.prepare(config, BYTE, cache, print)
  right = np.frombuffer(content, np.uint16)
  for start, stop in ((0, 160), (192, len(right)), (31, 33), (192, 193)):
    np.testing.assert_array_equal(again.train[start:stop], right[start:stop])
  for start, stop in ((150, 161), (191, 192), (0, len(right))):
    with pytest.raises(ConfigError, match='from byte 320'):
      again.train[start:stop]


@pytest.fixture
def hashed(monkeypatch):
  """The files that were hashed, by their names, and no wait for clocks."""
  names, digest = [], documents.digest
  monkeypatch.setattr(identity, '_RECENT', 0)
  monkeypatch.setattr(
    documents, 'digest', lambda file: names.append(file.name) or digest(file)
  )
  return names


def test_a_start_reads_nothing_until_a_stamp_differs(folder, tmp_path, hashed):
  """A touched text is hashed once; one of another content is another."""
  cache = tmp_path / 'cache'
  text = prepared(small(source=folder), cache)
  assert len(hashed) == 40
  hashed.clear()
  for known in ('', text.fingerprint):
    again = corpus.prepare(small(source=folder), BYTE, cache, print, known)
    assert not hashed and again.fingerprint == text.fingerprint
  path = pathlib.Path(folder) / '07.txt'
  os.utime(path, ns=(1, 1))
  for count in (40, 0):
    assert prepared(small(source=folder), cache).fingerprint == text.fingerprint
    assert len(hashed) == count
    hashed.clear()
  # The same size and date, and another text: the time of change tells.
  path.write_bytes(path.read_bytes().swapcase())
  os.utime(path, ns=(1, 1))
  other = prepared(small(source=folder), cache)
  assert len(hashed) == 40 and other.fingerprint != text.fingerprint
  third = prepared(small(source=folder, seed=1), cache)
  assert third.fingerprint not in (text.fingerprint, other.fingerprint)


def test_a_text_that_changed_just_now_is_not_remembered(folder, tmp_path):
  """Within the same tick of a clock it may change once more."""
  text = prepared(small(source=folder), tmp_path / 'cache')
  path = tmp_path / 'cache' / text.fingerprint / 'stamps.json'
  assert not path.exists()
  file = sources.File('a', 'a', True, 1, '1:2')
  identity.remember(path.parent, 'old', [file])
  assert identity.stamps(path.parent) == ['old']


def test_two_processes_may_prepare_at_once(folder, tmp_path, text):
  script = pathlib.Path(__file__).parent / 'preparing.py'
  words = script, folder, tmp_path / 'other'
  with children.Child(*words) as one, children.Child(*words) as other:
    said = [child.communicate(120) for child in (one, other)]
  assert said == 2 * [(f'{outcome(text)}\n', '')]
  assert os.listdir(tmp_path / 'other') == [text.fingerprint]


def test_a_large_vocabulary_has_wider_tokens(folder, tmp_path):
  large = dataclasses.replace(BYTE, vocab=70000, fingerprint='large')
  config, cache = small(source=folder), tmp_path / 'cache'
  wide, narrow = prepared(config, cache, large), prepared(config, cache)
  assert (wide.train.dtype, narrow.train.dtype) == (np.uint32, np.uint16)
  np.testing.assert_array_equal(wide.train, narrow.train)


def test_gzip_and_the_share_are_those_of_the_held_out_text(tmp_path):
  path, cache = tmp_path / 'rows.jsonl', tmp_path / 'cache'
  rows_of('jsonl', path, [f'{i} is {i * i} é' for i in range(3000)])
  config = small(source=str(path), heldout=0.2)
  text = prepared(config, cache)
  rows = documents_of(text.heldout)
  assert abs(len(rows) / 3000 - 0.2) < 0.035  # 4.8 standard deviations
  plain = b''.join(bytes(document[1:-1]) for document in rows)
  bits = 8 * len(gzip.compress(plain, 9)) / len(plain)
  np.testing.assert_allclose(text.gzip_bits_per_byte, bits, rtol=1e-12)
  assert plain.decode().startswith(text.prompt[:10])


def test_fim_keeps_every_character_and_leaves_held_out_text_alone(
  folder, tmp_path, text
):
  config = small(source=folder, fim_rate=1.0)
  rearranged = prepared(config, tmp_path / 'cache')
  cut, plain = documents_of(rearranged.train), documents_of(text.train)
  assert len(cut) == len(plain)
  for document, original in zip(cut, plain, strict=True):
    begin, hole, end = (document.index(i) for i in (BEGIN, HOLE, END))
    assert (document[0], document[-1], begin) == (BOS, EOS, 1)
    prefix, suffix = document[2:hole], document[hole + 1 : end]
    middle = document[end + 1 : -1]
    assert prefix + middle + suffix == original[1:-1]
  np.testing.assert_array_equal(rearranged.heldout, text.heldout)


def test_fim_rate_is_a_share_and_its_dice_are_keyed(tmp_path):
  path, cache = tmp_path / 'rows.jsonl', tmp_path / 'cache'
  rows_of('jsonl', path, [f'row number {i}' for i in range(3000)])
  config = small(source=str(path), fim_rate=0.1)
  first = prepared(config, cache)
  ids = np.asarray(first.train)
  fraction = (ids == BEGIN).sum() / (ids == BOS).sum()
  assert abs(fraction - 0.1) < 0.03  # 4.9 standard deviations of 2400 dice
  other = dataclasses.replace(config, seed=1)
  second = prepared(other, cache)
  both = documents_of(first.train), documents_of(second.train)
  changed = [a != b for a, b in zip(*both, strict=True)]
  assert 0.1 < np.mean(changed) < 0.3


def test_a_token_that_begins_and_ends_documents_needs_joined_rows(
  folder, tmp_path
):
  """An end would begin a document of its own, and would be no target."""
  words = dataclasses.replace(tokenizer.ByteTokenizer(), eos_id=256)
  corpus.prepare(small(source=folder), words, tmp_path, say=str)
  with pytest.raises(ConfigError, match='is eos_id, too'):
    data = small(source=folder, packing='separate')
    corpus.prepare(data, words, tmp_path, say=str)


def test_row21_too_little_text_and_too_small_a_vocabulary_are_said(
  folder, text
):
  tokens = len(text.train)
  large = small(source=folder, seq_len=512, batch_size=8)
  with pytest.raises(ConfigError) as caught:
    corpus_folder.check(text, large)
  assert f'{tokens} training tokens' in str(caught.value)
  assert f'needs {512 * 8 + 1}' in str(caught.value)
  long = small(source=folder, seq_len=len(text.heldout), batch_size=1)
  with pytest.raises(ConfigError, match='raise data.heldout=0.2, or lower'):
    corpus_folder.check(text, long)
  corpus_folder.check(text, small(source=folder))
  with pytest.raises(ConfigError, match='model.vocab=257.*258'):
    tokenizer.load('byte', vocab=257)
