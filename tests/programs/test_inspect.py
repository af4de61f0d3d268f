"""`experiments.inspect`: what a folder is, without its weights."""

import io
import json
import pathlib
import shutil

import pytest
from rich.console import Console

from experiments import inspect
from mla_moe import cost, load_huggingface
from mla_moe.checked import ConfigError

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


def shown(folder):
  out = io.StringIO()
  try:
    inspect.show(folder, Console(file=out, width=160))
  except ConfigError as error:
    return out.getvalue(), str(error)
  return out.getvalue(), ''


def test_a_release_is_described():
  text, refusal = shown(GOLDEN / 'v3_release')
  assert not refusal
  model, _ = load_huggingface(GOLDEN / 'v3_release')
  counts = cost.parameters(model)
  assert f'{counts.total / 1e6:.3g}M, active {counts.active / 1e6:.3g}M' in text
  for words in (
    'deepseek_v3',
    'FP8 with scales of 128 x 128',
    'in BF16',
    'YaRN x 8 from 64',
    '1 MTP',
    'h200',
  ):
    assert words in text, words


def test_a_family_of_its_own_is_named():
  text, _ = shown(GOLDEN / 'families' / 'large3')
  for words in ('mistral_large_3', 'queries grow by 0.1', 'group_top2', 'F32'):
    assert words in text, words


def test_a_refusal_is_the_loader_s(tmp_path):
  folder = tmp_path / 'copy'
  shutil.copytree(GOLDEN / 'families' / 'youtu', folder)
  (folder / 'model.safetensors').unlink()
  text, refusal = shown(folder)
  assert 'youtu' in text and 'tied' in text  # config.json can be read
  with pytest.raises(ConfigError) as caught:
    load_huggingface(folder)
  assert refusal == str(caught.value)
  values = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(values | {'index_topk': 8}))
  text, refusal = shown(folder)
  assert not text and 'index_topk=8' in refusal
