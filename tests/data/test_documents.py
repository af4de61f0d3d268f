"""Documents: nothing is lost, sides do not change, bad files are named."""

import dataclasses
import os

import pytest
from texts import BOS, BYTE, EOS, documents_of, prepared, rows_of, small

from experiments.data import corpus, documents
from mla_moe.config import ConfigError


def test_every_file_is_one_document_on_one_side(folder, text):
  rows = documents_of(text.train) + documents_of(text.heldout)
  assert all(d[0] == BOS and d[-1] == EOS for d in rows)
  paths = [os.path.join(folder, name) for name in os.listdir(folder)]
  expected = []
  for path in paths:
    with open(path, 'rb') as file:
      expected.append([BOS, *file.read(), EOS])
  assert sorted(rows) == sorted(expected)
  assert len(documents_of(text.heldout)) > 1


@pytest.mark.parametrize('count', [1, 2, 30])
def test_of_a_small_text_some_is_held_out(tmp_path, count):
  """A fraction of 1e-6 holds out no key, so one document is taken anyway."""
  lines = [f'line {i} of a small book\n' for i in range(30)]
  folder = tmp_path / 'text'
  folder.mkdir()
  for i in range(count):
    (folder / f'{i}.txt').write_text(''.join(lines[i::count]))
  config = small(source=str(folder), heldout=1e-6 if count > 1 else 0.1)
  text = prepared(config, tmp_path / 'cache')
  assert len(documents_of(text.heldout)) == 1 and len(text.train)
  content = lambda d: bytes(d[1:-1]).decode()
  heldout = content(documents_of(text.heldout)[0])
  assert text.heldout_bytes == len(heldout) and text.prompt == heldout
  both = heldout + ''.join(content(d) for d in documents_of(text.train))
  assert sorted(both.splitlines(True)) == sorted(lines)


def test_a_file_keeps_its_side_when_others_come(folder, tmp_path, text):
  more = os.path.join(folder, 'more.txt')
  with open(more, 'w', encoding='utf-8') as file:
    file.write('one more')
  config = small(source=folder)
  later = prepared(config, tmp_path / 'cache')
  assert later.fingerprint != text.fingerprint
  added = [BOS, *b'one more', EOS]
  old = [d for d in documents_of(later.heldout) if d != added]
  assert old == documents_of(text.heldout)


def test_the_key_of_a_whole_file_is_its_name(folder):
  one, other = (documents.files(folder)[i] for i in (0, 1))
  (before,) = documents.read(one)
  with open(other.path, 'rb') as source, open(one.path, 'wb') as target:
    target.write(source.read())
  ((after,), (same,)) = (documents.read(file) for file in (one, other))
  assert after.text == same.text != before.text
  assert before.key == after.key != same.key


def test_the_default_corpus_is_the_standard_library():
  files = documents.files('stdlib')
  names = [file.name for file in files]
  assert names == sorted(names) and len(set(names)) == len(names)
  assert {'json/decoder.py', 'typing.py'} <= set(names)
  assert not any('site-packages' in name or '/test/' in name for name in names)
  assert sum(os.path.getsize(file.path) for file in files) > 5e6


def test_a_large_text_is_cut_between_characters_and_nothing_is_lost(tmp_path):
  path = tmp_path / 'one.txt'
  paragraphs = ''.join(f'{i} é東🙂\n' * 5 + '\n' for i in range(3000))
  path.write_text(paragraphs + '東' * 40000, encoding='utf-8')
  (file,) = documents.files(str(path))
  pieces = list(documents.read(file))
  content = path.read_text(encoding='utf-8')
  assert ''.join(document.text for document in pieces) == content
  assert not any(document.replaced for document in pieces)
  sizes = [len(document.text.encode()) for document in pieces]
  assert len(sizes) > 10 and max(sizes) <= 16384
  ends = [d.text.endswith('\n\n') for d in pieces[:-9]]
  assert all(ends)


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_each_row_is_a_document_keyed_by_its_text(kind, tmp_path):
  path = tmp_path / f'rows.{kind}'
  rows_of(kind, path, ['one', 'zwei 東', 'one', '', 'x\ny'])
  rows = list(documents.read(documents.files(str(path))[0]))
  assert [d.text for d in rows] == ['one', 'zwei 東', 'one', 'x\ny']
  assert rows[0].key == rows[2].key != rows[1].key


def test_globs_and_folders_take_what_can_be_read(folder):
  (os.mkdir(os.path.join(folder, 'deep')))
  for name in ('deep/a.jsonl', 'deep/b.bin', '.hidden.txt'):
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
      file.write('{"text": "t"}\n')
  names = [file.name for file in documents.files(folder)]
  assert len(names) == 41 and 'deep/a.jsonl' in names
  files = documents.files(os.path.join(folder, '**', '*.jsonl'))
  assert [file.name for file in files] == ['deep/a.jsonl']


def fails(config, tmp_path):
  """Returns the one line that refuses the source."""
  with pytest.raises(ConfigError) as caught:
    text = prepared(config, tmp_path / 'cache')
    data_config = dataclasses.replace(config, seq_len=max(config.seq_len, 8))
    corpus.check(text, data_config)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_missing_empty_and_unknown_sources_are_named(tmp_path):
  empty, odd = tmp_path / 'empty.txt', tmp_path / 'odd.bin'
  empty.write_bytes(b'')
  odd.write_bytes(b'x')
  (tmp_path / 'none').mkdir()
  (tmp_path / 'blank').mkdir()
  (tmp_path / 'blank' / 'a.txt').write_bytes(b'')
  (tmp_path / 'blank' / 'b.txt').write_bytes(b'')
  for source, says in (
    ('nowhere', 'no such file'),
    ('nowhere/*.txt', 'holds no file'),
    ('empty.txt', 'is empty'),
    ('odd.bin', 'must end in'),
    ('none', 'holds no file'),
    ('blank', 'holds no text'),
  ):
    config = small(source=str(tmp_path / source))
    message = fails(config, tmp_path)
    assert says in message and source in message


def test_a_bad_row_is_named_with_its_line(tmp_path):
  path = tmp_path / 'rows.jsonl'
  good = '{"text": "fine"}\n'
  for bad in (
    '{"text": ',
    '["text"]',
    '{"txt": "a"}',
    '{"text": 3}',
    '[' * 9999,
  ):
    path.write_text(good + '\n' + bad + '\n')
    assert 'rows.jsonl:3:' in fails(small(source=str(path)), tmp_path)


def test_a_bad_parquet_is_named(tmp_path):
  pytest.importorskip('pyarrow', reason='the extra [data] is not installed')
  path = tmp_path / 'rows.parquet'
  path.write_bytes(b'PAR1 not really')
  assert 'rows.parquet' in fails(small(source=str(path)), tmp_path)
  import pyarrow
  import pyarrow.parquet

  pyarrow.parquet.write_table(pyarrow.table({'body': ['a']}), path)
  assert 'no column "text", only body' in fails(
    small(source=str(path)), tmp_path
  )


def test_a_file_that_cannot_be_opened_is_named(folder, tmp_path):
  (file, *_) = documents.files(folder)
  os.remove(file.path)
  with pytest.raises(ConfigError, match=r'00\.txt: cannot be read'):
    list(documents.read(file))


@pytest.mark.parametrize('encoding', ['utf-16-le', 'utf-16-be'])
def test_utf16_is_refused(folder, encoding):
  path = os.path.join(folder, '00.txt')
  with open(path, 'wb') as file:
    file.write('\ufefftext'.encode(encoding))
  for source in (folder, path):  # one of many, and the only one
    with pytest.raises(ConfigError, match=r'00\.txt: is UTF-16; write it as'):
      list(documents.read(documents.files(source)[0]))


def test_invalid_utf8_is_replaced_counted_and_said_once(folder, tmp_path):
  for name in ('a.txt', 'b.txt'):
    with open(os.path.join(folder, name), 'wb') as file:
      file.write(b'genuine \xef\xbf\xbd, broken \xff and \xc3(')
  lines = []
  config, cache = small(source=folder), tmp_path / 'cache'
  text = corpus.prepare(config, BYTE, cache, lines.append)
  assert sum('4 pieces of invalid UTF-8' in line for line in lines) == 1
  rows = documents_of(text.train) + documents_of(text.heldout)
  content = 'genuine \ufffd, broken \ufffd and \ufffd('.encode()
  assert rows.count([BOS, *content, EOS]) == 2


def test_invalid_bytes_of_a_row_and_halves_of_a_pair_are_both_counted(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"text": "a\xff"}\n{"text": "b\\ud800 \xff"}\n')
  (file,) = documents.files(str(path))
  counts = [document.replaced for document in documents.read(file)]
  assert counts[0] == 1 and counts[1] > 1


def test_a_module_of_the_standard_library_is_a_document():
  files = documents.files('stdlib')
  assert len(files) > 100 and all(f.path.endswith('.py') for f in files)
  assert all(file.is_document for file in files)
