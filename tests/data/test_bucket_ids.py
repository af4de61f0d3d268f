"""Ids in an emulated bucket of Google's: the rows that they have on a disk."""

import dataclasses

import fsspec
import numpy as np
import pytest
from bucket_server import NAME, server  # noqa: F401
from id_files import DOCUMENTS, megatron
from texts import BOS, prepared, small

from experiments.data import batches, remote
from mla_moe.config import ConfigError

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures('server'),
  pytest.mark.filterwarnings('default'),  # of third-party code
]


def test_ids_in_a_bucket_of_google_s_are_a_source(tmp_path):
  """An emulated one, whose checksums stand for the content."""
  system = fsspec.filesystem('gs')
  path = megatron(tmp_path / 'a.bin', DOCUMENTS)
  for name in ('a.bin', 'a.idx'):
    system.put(str(tmp_path / name), f'{NAME}/ids/{name}')
  url = f'gs://{NAME}/ids'
  (file, _) = remote.listed(url)[1]
  assert remote.is_checksum(file.stamp)
  assert remote.lookup(file.path) == file
  there = small(source=f'{url}/*.bin', packing='separate', block_rows=4)
  here = dataclasses.replace(there, source=str(path))
  one = prepared(there, tmp_path / 'cache')
  other = prepared(here, tmp_path / 'cache')
  ours = batches.batch_at(one.train, there, 3, BOS)
  right = batches.batch_at(other.train, here, 3, BOS)
  for a, b in zip(ours, right, strict=True):
    np.testing.assert_array_equal(a, b)
  gone = small(source='gs://no-such-bucket/a.bin')
  with pytest.raises(ConfigError, match='no such bucket or object'):
    prepared(gone, tmp_path / 'cache')
