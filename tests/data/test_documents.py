"""Documents: nothing is lost, sides do not change, bad files are named."""

import bz2
import dataclasses
import gzip
import json
import lzma
import os
import pathlib

import pytest
from texts import BOS, BYTE, EOS, documents_of, prepared, rows_of, small

from experiments.data import (
  corpus,
  corpus_folder,
  documents,
  encodings,
  sources,
)
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
  one, other = sources.listed(folder).files[:2]
  (before,) = documents.read(one)
  with open(other.path, 'rb') as source, open(one.path, 'wb') as target:
    target.write(source.read())
  ((after,), (same,)) = (documents.read(file) for file in (one, other))
  assert after.text == same.text != before.text
  assert before.key == after.key != same.key


def test_the_default_corpus_is_the_standard_library():
  files = sources.listed('stdlib').files
  names = [file.name for file in files]
  assert names == sorted(names) and len(set(names)) == len(names)
  assert {'json/decoder.py', 'typing.py'} <= set(names)
  assert not any('site-packages' in name or '/test/' in name for name in names)
  assert sum(os.path.getsize(file.path) for file in files) > 5e6


def test_a_large_text_is_cut_between_characters_and_nothing_is_lost(tmp_path):
  path = tmp_path / 'one.txt'
  paragraphs = ''.join(f'{i} é東🙂\n' * 5 + '\n' for i in range(3000))
  path.write_text(paragraphs + '東' * 40000, encoding='utf-8')
  (file,) = sources.listed(str(path)).files
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
  rows = list(documents.read(sources.listed(str(path)).files[0]))
  assert [d.text for d in rows] == ['one', 'zwei 東', 'one', 'x\ny']
  assert rows[0].key == rows[2].key != rows[1].key


def test_globs_and_folders_take_what_can_be_read(folder):
  (os.mkdir(os.path.join(folder, 'deep')))
  for name in ('deep/a.jsonl', 'deep/b.bin', '.hidden.txt'):
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
      file.write('{"text": "t"}\n')
  names = [file.name for file in sources.listed(folder).files]
  assert len(names) == 41 and 'deep/a.jsonl' in names
  files = sources.listed(os.path.join(folder, '**', '*.jsonl')).files
  assert [file.name for file in files] == ['deep/a.jsonl']


def fails(config, tmp_path):
  """Returns the one line that refuses the source."""
  with pytest.raises(ConfigError) as caught:
    text = prepared(config, tmp_path / 'cache')
    data_config = dataclasses.replace(config, seq_len=max(config.seq_len, 8))
    corpus_folder.check(text, data_config)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_missing_empty_and_unknown_sources_are_named(tmp_path):
  empty, odd = tmp_path / 'empty.txt', tmp_path / 'odd.dat'
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
    ('odd.dat', 'must end in'),
    ('odd.dat', 'or of ids, by name or glob: .bin'),
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
    line = fails(small(source=str(path)), tmp_path)
    assert 'rows.jsonl:3:' in line
    assert ('a string "text", and has txt' in line) == ('txt' in bad)


@pytest.mark.parametrize('kind', ['jsonl', 'json', 'parquet'])
def test_rows_have_their_text_in_a_field_of_another_name(kind, tmp_path):
  """The ids are those of the same rows with the usual name."""
  rows = [f'row {i}' for i in range(300)]
  other, usual = tmp_path / f'other.{kind}', tmp_path / 'usual.jsonl'
  rows_of('jsonl', usual, rows)
  if kind == 'parquet':
    pyarrow = pytest.importorskip('pyarrow', reason='extra [data] is missing')
    parquet = pytest.importorskip('pyarrow.parquet')
    columns = {'content': rows, 'text': ['-'] * 300, 'tokens': [[1]] * 300}
    parquet.write_table(pyarrow.table(columns), other)
  else:
    lines = [json.dumps({'content': row, 'text': 3}) for row in rows]
    other.write_text('\n'.join(lines))
  config = small(source=str(other), field='content')
  ours = prepared(config, tmp_path / 'cache')
  right = prepared(small(source=str(usual)), tmp_path / 'cache')
  assert [*ours.train[:]] == [*right.train[:]]
  assert prepared(config, tmp_path / 'cache').fingerprint == ours.fingerprint
  wrong = small(source=str(other), field='body')
  assert 'data.field names' in fails(wrong, tmp_path)
  plain = small(source=str(other))
  if kind == 'parquet':  # the same file, and another text
    text = prepared(plain, tmp_path / 'cache')
    assert text.fingerprint != ours.fingerprint
  else:
    assert 'must be an object with a string "text"' in fails(plain, tmp_path)


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
  (file, *_) = sources.listed(folder).files
  os.remove(file.path)
  with pytest.raises(ConfigError, match=r'00\.txt: cannot be read'):
    list(documents.read(file))


ENCODINGS = ('utf-8-sig', 'utf-16', 'utf-16-be', 'utf-32', 'utf-32-be')


def encoded(text, encoding):
  mark = '\ufeff' if encoding.endswith('be') else ''  # the others write it
  return (mark + text).encode(encoding)


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_an_encoding_is_known_by_its_mark(encoding, tmp_path):
  """As one document, in pieces, in rows: the same as of plain UTF-8."""
  folder = tmp_path / 'text'
  folder.mkdir()
  text = ''.join(f'{i} é東🙂, plain words.\r\n' for i in range(900))
  row = json.dumps({'text': text}, ensure_ascii=False)

  def read():
    files = sources.listed(str(folder), 0.02).files
    return {f.name: [*documents.read(f)] for f in files}

  contents = {'a.txt': text[:999], 'pieces.txt': text, 'row.jsonl': ''}
  contents['row.jsonl'] = f'{row}\n\n{row}\r\n'
  for name, content in contents.items():
    (folder / name).write_text(content, encoding='utf-8', newline='')
  plain = read()
  assert [len(plain[name]) for name in contents] == [1, 2, 2]
  for name, content in contents.items():
    (folder / name).write_bytes(encoded(content, encoding))
  assert read() == plain


def test_an_encoding_that_is_not_known_is_refused_by_name(tmp_path):
  for content, says in (
    ('plain words'.encode('utf-16-le'), 'is full of NULs'),
    ('plain words'.encode('utf-32-be'), 'is full of NULs'),
    (encoded('plain words', 'utf-16')[:-1], 'UTF-16-LE by its mark'),
    (encoded('words \0', 'utf-32')[:-4] + b'\xff' * 4, 'UTF-32-LE by its mark'),
  ):
    for name in ('words.txt', 'words.jsonl'):
      (tmp_path / name).write_bytes(content)
      message = fails(small(source=str(tmp_path / name)), tmp_path)
      assert says in message and name in message and 'iconv' in message


def packed(content, suffix):
  if suffix != '.zst':
    codec = {'.gz': gzip, '.bz2': bz2, '.xz': lzma}[suffix]
    return codec.compress(content)
  pyarrow = pytest.importorskip('pyarrow', reason='extra [data] is missing')
  return pyarrow.compress(content, 'zstd', asbytes=True)


@pytest.mark.parametrize('suffix', encodings.COMPRESSED)
def test_compressed_shards_are_read(suffix, tmp_path):
  rows = [f'row {i} of the data ' * 20 for i in range(500)]
  lines = [json.dumps({'text': row}).encode() + b'\n' for row in rows]
  folder = tmp_path / 'text'
  folder.mkdir()
  first, second = b''.join(lines[:200]), b''.join(lines[200:])
  # A file may be two compressed files, one after the other.
  both = packed(first, suffix) + packed(second, suffix)
  (folder / f'part-0.jsonl{suffix}').write_bytes(both)
  (folder / f'PART-1.JSON{suffix.upper()}').write_bytes(packed(first, suffix))
  (folder / f'book.txt{suffix}').write_bytes(packed(b'of words', suffix))
  (folder / f'rows.parquet{suffix}').write_bytes(b'PAR1')
  files, left_out = sources.listed(str(folder))
  assert [len([*documents.read(f)]) for f in files] == [200, 1, 500]
  texts = [d.text for f in files for d in documents.read(f)]
  assert texts == rows[:200] + ['of words'] + rows
  right = f'left out are 1 of .parquet{suffix} (rows.parquet{suffix}).'
  assert left_out == f'{str(folder)!r}: {right}'
  for damaged in (both[:-9], both[:40] + b'no' + both[42:], b'nothing'):
    path = tmp_path / f'damaged.jsonl{suffix}'
    path.write_bytes(damaged)
    message = fails(small(source=str(path)), tmp_path)
    assert path.name in message and 'cut off' in message


def test_linked_folders_are_read_once_and_never_in_a_circle(tmp_path):
  root, away = tmp_path / 'root', tmp_path / 'away'
  for place in (root, away / 'deep'):
    place.mkdir(parents=True)
    (place / 'a.txt').write_text('text')
  (root / 'b').symlink_to(away)
  (root / 'c').symlink_to(away / 'deep')  # which b has
  (root / 'd').symlink_to(tmp_path)  # which has this folder
  (away / 'e').symlink_to(away)
  (away / 'f').symlink_to(root)
  listing = sources.listed(str(root))
  assert len(listing.files) == 2
  assert '3 links to folders that are read (b/e, b/f, c)' in listing.left_out
  assert '1 links to folders around one that is read' in listing.left_out


def test_files_that_are_left_out_are_counted_and_named(folder, tmp_path):
  """A folder, a glob; and a folder that holds nothing else."""
  lines, root = [], pathlib.Path(folder)
  (root / 'deep').mkdir()
  (root / 'deep' / 'UPPER.TXT').write_text('is read')
  for name in ('a.csv', 'b.csv', 'c.csv', 'd.csv', 'LICENSE', 'x.tar.gz'):
    (root / name).write_text('text')
  (root / 'package.json').write_text('{\n "text": 1}')
  (root / 'rows.json').write_text('{"text": "is read"}\n')
  (root / '.git').mkdir()
  (root / 'deep' / '.env').write_text('x')
  (root / 'linked').symlink_to(root / 'deep')
  (root / 'gone.txt').symlink_to(root / 'nowhere')
  os.mkfifo(root / 'pipe.txt')
  config = small(source=folder)
  text = corpus.prepare(config, BYTE, tmp_path / 'cache', lines.append)
  (line,) = [line for line in lines if 'left out' in line]
  assert line == (
    f'{folder!r}: left out are 2 hidden (.git, deep/.env), 1 links to folders '
    'that are read (linked), 1 links to nothing (gone.txt), 1 no regular '
    'files (pipe.txt), '
    '4 of .csv (a.csv, b.csv, c.csv, ...), 1 of .json without lines {"text": '
    '...} (package.json), 1 of .tar.gz (x.tar.gz), 1 without a suffix '
    '(LICENSE).'
  )
  rows = documents_of(text.train) + documents_of(text.heldout)
  assert rows.count([BOS, *b'is read', EOS]) == 2 and len(rows) == 42
  assert '2 folders (deep, linked)' in sources.listed(f'{folder}/*').left_out
  assert 'folders' not in sources.listed(f'{folder}/**').left_out
  only = tmp_path / 'only'
  only.mkdir()
  (only / 'a.csv').write_text('text')
  assert 'left out are 1 of .csv (a.csv)' in fails(
    small(source=str(only)), tmp_path
  )


def test_a_name_that_is_no_utf8_is_a_name(tmp_path):
  """Two such names are two keys, and can be printed."""
  folder, lines = os.fsencode(tmp_path / 'text'), []
  os.mkdir(folder)
  for name in (b'a\xff.txt', b'a\xfe.txt', b'x\xff.pdf', 'ä.txt'.encode()):
    try:
      with open(os.path.join(folder, name), 'wb') as file:
        file.write(b'broken \xff text\n' * 400)
    except OSError:
      pytest.skip('a file system of UTF-8 names')
  source = str(tmp_path / 'text')
  text = corpus.prepare(small(source=source), BYTE, tmp_path, lines.append)
  assert text.facts['documents'] == 3
  names = [file.name for file in sources.listed(source).files]
  assert sorted(names) == ['a\\xfe.txt', 'a\\xff.txt', 'ä.txt']
  assert '1 of .pdf (x\\xff.pdf)' in ''.join(lines).encode().decode()


@pytest.mark.parametrize('glob', ['', '/**/*.txt', '/**'])
def test_a_run_below_its_source_is_no_text_of_it(glob, folder, tmp_path):
  """Its records would make another text at each start."""
  source = f'{folder}{glob}'
  before = sources.listed(source)
  run = tmp_path / 'text' / 'deep' / 'run'
  (run / 'log').mkdir(parents=True)
  for name in ('config.json', 'lock', 'samples.txt', 'log/0.txt'):
    (run / name).write_text('a record of the run')
  after = sources.listed(source)
  assert after.files == before.files and 'folders of runs' in after.left_out
  (run / 'lock').unlink()
  assert len(sources.listed(source).files) == len(before.files) + 2


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_rows_without_a_text_are_skipped_and_counted(kind, tmp_path):
  """One rule for both: a null and an empty text are no documents."""
  path, lines = tmp_path / f'rows.{kind}', []
  rows = [f'row {i}' for i in range(50)]
  rows[0], rows[30], rows[49] = None, None, ''
  rows_of(kind, path, rows)
  config, cache = small(source=str(path)), tmp_path / 'cache'
  text = corpus.prepare(config, BYTE, cache, lines.append)
  both = documents_of(text.train) + documents_of(text.heldout)
  right = [[BOS, *row.encode(), EOS] for row in rows if row]
  assert sorted(both) == sorted(right)
  assert '3 rows without text were skipped.' in lines


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
  (file,) = sources.listed(str(path)).files
  counts = [document.replaced for document in documents.read(file)]
  assert counts[0] == 1 and counts[1] > 1


def test_a_module_of_the_standard_library_is_a_document():
  files = sources.listed('stdlib').files
  assert len(files) > 100 and all(f.path.endswith('.py') for f in files)
  assert all(file.is_document for file in files)
