"""The golden checkpoints, and ways to change and compare folders like them."""

import functools
import json
import pathlib

import numpy as np
import pytest

from mla_moe import ConfigError, load_huggingface
from mla_moe.hf import formats, safetensors

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'golden'


@functools.cache
def loaded(case):
  return load_huggingface(GOLDEN / case)


def tensors(folder):
  """Returns {name: array} of all tensors in a folder."""
  arrays = {}
  for path in sorted(pathlib.Path(folder).glob('*.safetensors')):
    with safetensors.File(path) as file:
      arrays |= {name: np.array(file.read(name)) for name in file.entries}
  return arrays


def rewrite(folder, change):
  """Writes a folder's tensors again, in one file, after `change(arrays)`."""
  arrays = tensors(folder)
  change(arrays)
  for path in folder.glob('model*'):
    path.unlink()
  plan = {name: (x.dtype, x.shape) for name, x in arrays.items()}
  with safetensors.create(folder / 'model.safetensors', plan) as out:
    for name, x in arrays.items():
      out[name][...] = x


def dequantized(q, scale):
  """Returns the float32 weights of E4M3 numbers in tiles of 128 x 128."""
  return formats.decode('fp8', q, scale, (128, 128), q.shape[1])


def set_config(folder, **changes):
  path = folder / 'config.json'
  values = json.loads(path.read_text()) | changes
  path.write_text(json.dumps(values))


def same_bytes(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
    assert a[name].tobytes() == b[name].tobytes(), name


def refused(folder, *words):
  """Loading is refused in a line with these words, none in a folder's name.

  pytest names folders by their tests, which say the words themselves.
  """
  with pytest.raises(ConfigError) as caught:
    load_huggingface(folder)
  text = str(caught.value)
  assert '\n' not in text
  for place in (folder, *folder.parents[:2]):
    text = text.replace(str(place), '')
  assert 'pytest-' not in text
  for word in words:
    assert word in text, text
