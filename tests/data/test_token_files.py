"""Ids as a source: the same rows of each kind of file, mistakes in a line."""

import dataclasses
import os

import numpy as np
import pytest
from texts import BOS, BYTE, EOS, prepared, small, write_folder

from experiments.data import corpus
from mla_moe.config import ConfigError
from mla_moe.data import batches


def megatron(path, documents, dtype='uint16', code=8):
  """Writes .bin and .idx as Megatron's IndexedDatasetBuilder does."""
  ids = [np.array(document, dtype) for document in documents]
  path.with_suffix('.bin').write_bytes(b''.join(x.tobytes() for x in ids))
  lengths = np.array([len(x) for x in ids], '<i4')
  starts = (np.cumsum(lengths) - lengths).astype('<i8') * np.dtype(
    dtype
  ).itemsize
  head = b'MMIDIDX\x00\x00' + np.array([1], '<u8').tobytes() + bytes([code])
  head += np.array([len(ids), len(ids) + 1], '<u8').tobytes()
  index = head + lengths.tobytes() + starts.tobytes()
  index += np.arange(len(ids) + 1, dtype='<i8').tobytes()
  path.with_suffix('.idx').write_bytes(index)
  return path.with_suffix('.bin')


DOCUMENTS = [[BOS, *(i * 7 % 250 + n % 5 for n in range(9 + i)), EOS]
             for i in range(40)]  # fmt: skip
IDS = np.concatenate(DOCUMENTS)


def write(kind, folder):
  """A file of these ids; returns its path and changes of the config."""
  path = folder / f'ids.{kind.split("-")[0]}'
  if kind == 'bin-uint32':
    path.write_bytes(IDS.astype('<u4').tobytes())
    return path, dict(dtype='uint32')
  if kind == 'bin':
    path.write_bytes(IDS.astype('<u2').tobytes())
  elif kind == 'npy':
    np.save(path, IDS.astype(np.int64))
  elif kind.startswith('bin-megatron'):
    code = {'2': ('uint16', 8), '4': ('int32', 4)}[kind[-1]]
    return megatron(path, DOCUMENTS, *code), {}
  else:
    pyarrow = pytest.importorskip('pyarrow', reason='extra [data] is missing')
    parquet = pytest.importorskip('pyarrow.parquet')
    table = pyarrow.table({'n': [1] * 40, 'input_ids': DOCUMENTS})
    if kind == 'parquet':
      parquet.write_table(table, path, row_group_size=7)
    else:
      opening = {'stream': pyarrow.ipc.new_stream, 'file': pyarrow.ipc.new_file}
      with opening[kind.split('-')[1]](str(path), table.schema) as sink:
        sink.write_table(table, max_chunksize=9)
  return path, {}


KINDS = ['bin', 'bin-uint32', 'npy', 'bin-megatron-2', 'bin-megatron-4']
KINDS += ['parquet', 'arrow-stream', 'arrow-file']


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
  lengths = BYTE.byte_lengths()
  assert text.heldout_bytes == lengths[IDS[cut:]].sum()
  assert text.prompt and text.gzip_bits_per_byte > 0
  assert corpus.verify(text) == len(IDS)


def test_files_of_a_glob_are_one_stream(tmp_path):
  """In order of name, of any types, and cut anywhere."""
  np.save(tmp_path / '1.npy', IDS[:333].astype(np.int64))
  np.save(tmp_path / '2.npy', IDS[333:].astype(np.uint16))
  data = small(source=f'{tmp_path}/*.npy')
  text = prepared(data, tmp_path / 'cache')
  both = np.concatenate([text.train[:], text.heldout[:]])
  np.testing.assert_array_equal(both, IDS)
  np.testing.assert_array_equal(text.train[330:337], IDS[330:337])


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
  with pytest.raises(ConfigError, match='ids.npy: MiB 0 is damaged'):
    batches.batch_at(text.train, data, 0, BOS)


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
  for name, words in (('float', 'are integers'), ('negative', 'the id -1')):
    with pytest.raises(ConfigError, match=words):
      prepared(small(source=f'{tmp_path}/{name}.npy'), tmp_path / 'cache')
  path = megatron(tmp_path / 'cut.bin', DOCUMENTS)
  path.write_bytes(path.read_bytes()[:-2])
  with pytest.raises(ConfigError, match='cut.idx: .* or one is cut'):
    prepared(small(source=str(path)), tmp_path / 'cache')
  path.with_suffix('.idx').write_bytes(b'nonsense')
  with pytest.raises(ConfigError, match='is no index of Megatron'):
    prepared(small(source=str(path)), tmp_path / 'cache')
