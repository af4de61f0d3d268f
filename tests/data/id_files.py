"""Files of the same ids, of each kind that can be a source."""

import numpy as np
import pytest
from texts import BOS, EOS


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
