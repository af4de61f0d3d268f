"""starts.jsonl of a run: when, where and with which versions it trained.

Each start or resume has a row. Rows are never dropped: a start has happened.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import pathlib
import platform
from collections.abc import Sequence

import jax

from .. import doctor, workdir

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax')


def record(folder: pathlib.Path, step: int, texts: Sequence[dict] = ()) -> None:
  """Adds the row of a start from `step`; the date is UTC.

  `texts` are numbers of the run's texts.
  """
  now = datetime.datetime.now(datetime.UTC)
  row = {
    'step': step,
    'date': now.isoformat(sep=' ', timespec='seconds')[:19],
    'commit': doctor.commit(),
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in PACKAGES},
    'device': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'processes': jax.process_count(),
    **({'texts': list(texts)} if texts else {}),
  }
  rows = workdir.Rows(folder / 'starts.jsonl')
  rows.append(row)
  rows.close()
