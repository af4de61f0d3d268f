"""safetensors: hostile bytes are refused, files are those of the library."""

import json
import struct

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from mla_moe import ConfigError
from mla_moe.hf import safetensors


@pytest.fixture(scope='module')
def small_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('small') / 'a.safetensors'
  plan = {
    'a': (np.dtype(np.float32), (3, 2)),
    'b': (np.dtype(ml_dtypes.float8_e4m3fn), (5,)),
  }
  with safetensors.create(path, plan) as out:
    out['a'][:], out['b'][:] = 1, 2
  return path.read_bytes()


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(st.data())
def test_row37_reader_survives_any_bytes(tmp_path_factory, small_file, data):
  """Damaged files are a ConfigError or read within their own bytes."""
  content = small_file
  kind = data.draw(st.sampled_from(['bytes', 'cut', 'header', 'random']))
  if kind == 'random':
    blob = data.draw(st.binary(max_size=200))
  elif kind == 'cut':
    blob = content[: data.draw(st.integers(0, len(content)))]
  elif kind == 'bytes':
    blob = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
      at = data.draw(st.integers(0, len(blob) - 1))
      blob[at] = data.draw(st.integers(0, 255))
  else:
    number = st.integers(-(2**70), 2**70) | st.integers(0, 64)
    leaf = number | st.none() | st.booleans() | st.text(max_size=3)
    entry = st.fixed_dictionaries(
      {
        'dtype': st.sampled_from(['F32', 'F8_E4M3', 'X', 3]),
        'shape': st.lists(leaf, max_size=3),
        'data_offsets': st.lists(leaf, max_size=3),
      }
    )
    header = data.draw(st.dictionaries(st.text(max_size=3), entry | leaf))
    text = json.dumps(header).encode()
    blob = struct.pack('<Q', len(text)) + text + bytes(40)
  path = tmp_path_factory.getbasetemp() / 'fuzzed.safetensors'
  path.write_bytes(bytes(blob))
  try:
    with safetensors.File(path) as file:
      total = sum(file.read(name).nbytes for name in file.entries)
      assert total <= len(blob)
  except ConfigError as error:
    assert str(path) in str(error)


def test_files_are_those_of_the_library(tmp_path):
  library = pytest.importorskip('safetensors.numpy')
  values = {'x': np.arange(6, dtype=np.float32).reshape(2, 3)}
  library.save_file(values, tmp_path / 'a.safetensors')
  with safetensors.File(tmp_path / 'a.safetensors') as file:
    np.testing.assert_array_equal(file.read('x'), values['x'])
  plan = {'x': (np.dtype(np.float32), (2, 3))}
  with safetensors.create(tmp_path / 'b.safetensors', plan) as out:
    out['x'][:] = values['x']
  back = library.load_file(tmp_path / 'b.safetensors')
  np.testing.assert_array_equal(back['x'], values['x'])


def test_metadata_maps_texts_to_texts_in_a_bounded_header(tmp_path):
  for value in ('{"__metadata__":{"a":[[],[]]}}', '{"__metadata__":3}'):
    with pytest.raises(ConfigError, match='__metadata__'):
      safetensors.parse(value.encode(), 0)
  assert safetensors.parse(b'{"__metadata__":{"format":"pt"}}', 0) == {}
  with open(tmp_path / 'large.safetensors', 'wb') as file:
    file.write((30_000_000).to_bytes(8, 'little'))
    file.truncate(40_000_000)
  with pytest.raises(ConfigError, match='a header of 30000000 bytes'):
    safetensors.File(tmp_path / 'large.safetensors')
