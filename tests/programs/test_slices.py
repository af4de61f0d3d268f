"""The record of compiled meshes has those that the documentation names."""

import pathlib
import re
import types

import pytest

from experiments import chips
from experiments.bench import slices
from mla_moe.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
RECORD = ROOT / 'experiments/bench/slices.md'
FILES = {'V3': 'deepseek_v3', 'V2-Lite': 'deepseek_v2_lite'}
SLICE = r'(?:v5e|v5p|v6e|tpu7x|[ahb]\d00)[ :][\dx]+(?:\*\d+)?'
MESH = r'(?:\w+=\d+,? ?)+'


def program(config, topology, mesh):
  slice_ = chips.parse(topology.strip().replace(' ', ':'))
  sizes = sorted(re.findall(r'(\w+)=(\d+)', mesh))
  return config, str(slice_), tuple(s for s in sizes if s[1] != '1')


def in_commands(text):
  for line in text.replace('\\\n', ' ').splitlines():
    topology = re.search(r'--topology=(\S+)', line)
    config = re.search(r'--config=configs/(\w+)\.py', line)
    mesh = ','.join(
      f'{axis}={size}'
      for axis, size in re.findall(r'--config\.mesh\.(\w+)=(\d+)', line)
    )
    mesh += ''.join(re.findall(r'--mesh=(\S+)', line))
    # The step of reinforcement has other inputs, which no plan compiles.
    if topology and config and mesh and '--program=rl' not in line:
      yield program(config[1], topology[1], mesh)


def in_tables(text):
  """Of a table, its first cells name the slice and the mesh.

  The model stands in the row, or over the column.
  """
  for table in re.findall(r'(?:^\|.*\n)+', text, re.MULTILINE):
    head = table.splitlines()[0]
    for row in table.splitlines()[2:]:
      slice_, mesh = (cell.strip() for cell in row.split('|')[1:3])
      topology = re.search(SLICE, slice_)
      models = [n for n in FILES if n in slice_ or n in head]
      if topology and re.fullmatch(MESH, mesh) and models:
        yield program(FILES[models[0]], topology[0], mesh)


def test_a_row_says_what_the_compiler_says_of_its_program(
  monkeypatch, tmp_path
):
  only = lambda text: slices.run(tmp_path, types.SimpleNamespace(only=text))
  with pytest.raises(ConfigError, match='--only=v9: is in no row; .*v5e:8x8'):
    only('v9')
  texts = ['no room', f'--schedule: {slices.compiled.BUSY}; wait for it']

  def refuse(*_):
    raise ConfigError(texts.pop(0))

  monkeypatch.setattr(slices.scheduled, 'run', refuse)
  only('v5p:4x4x8')
  assert '| refused: no room |' in (tmp_path / 'slices.md').read_text()
  with pytest.raises(ConfigError, match='is using libtpu'):
    only('v5p:4x4x8')


def test_the_record_has_every_mesh_of_the_documentation_and_no_other():
  named = set()
  for path in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]:
    text = path.read_text(encoding='utf-8')
    named |= {*in_commands(text), *in_tables(text)}
  rows = [
    [cell.strip() for cell in line.split('|')[1:4]]
    for line in RECORD.read_text(encoding='utf-8').splitlines()
    if line.startswith('| deepseek')
  ]
  record = {program(*row) for row in rows}
  listed = {program(*each) for each in slices.PROGRAMS}
  assert record == listed and len(rows) == len(slices.PROGRAMS)
  # docs/plan.md has its own table of whole programs for GPUs.
  plan = (ROOT / 'docs/plan.md').read_text(encoding='utf-8')
  whole = plan[plan.index('Programs for NVIDIA, compiled whole') :]
  gpus = {p for p in in_tables(whole) if chips.parse(p[1]).gpu}
  assert gpus and named - gpus == record
