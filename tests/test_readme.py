"""The README is short; its example runs; its targets exist.

Its commands are run with those of the pages (`test_docs.py`).
"""

import importlib
import pathlib
import re
import subprocess
import sys

import pytest

from mla_moe.config import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / 'README.md').read_text()


def blocks(language):
  """The fenced blocks of a language, in order."""
  return re.findall(rf'```{language}\n(.*?)```', TEXT, re.S)


def test_it_is_a_door():
  """One screen has the pictures, the commands and the example."""
  assert len(TEXT.splitlines()) <= 150
  (example,) = blocks('python')
  assert len(example.splitlines()) <= 13
  assert TEXT.index(example) < TEXT.index('\n## ')
  pictures = re.findall(r'<img src="([^"]+)"', TEXT)
  assert len(pictures) == 2
  assert all((ROOT / picture).exists() for picture in pictures)
  results = TEXT.split('## Results')[1].split('What ran where')[0]
  assert len(re.findall(r'^\| \[', results, re.M)) <= 8


@pytest.mark.slow
def test_the_example_runs(tmp_path):
  """Its comments are true: shapes, and a folder with FP8 blocks at the end."""
  (example,) = blocks('python')
  example = example.replace('runs/', f'{tmp_path}/')
  checks = (
    'assert out.logits.shape == (1, 5, config.vocab)\n'
    'assert out.mtp_logits.shape == (1, 1, 4, config.vocab)\n'
    'assert (out.expert_load.sum(1) == 5 * config.moe.top_k).all()\n'
    'assert tokens.shape == (1, 13)\n'
  )
  code = example + checks
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
  assert 'fp8' in (tmp_path / 'copy' / 'config.json').read_text()


def test_targets_and_configs_exist():
  makefile = (ROOT / 'Makefile').read_text()
  targets = set(re.findall(r'(?:`|    )make ([a-z0-9-]+)', TEXT))
  assert {'train', 'test'} <= targets
  for name in targets:
    assert re.search(rf'^{name}:', makefile, re.M), name
  listed = set(re.findall(r'`configs/(\w+)\.py`', TEXT))
  assert listed == {p.stem for p in (ROOT / 'configs').glob('[a-z]*.py')}


def test_the_tree_is_the_package():
  """The files of each folder of mla_moe, all of them; every program exists."""
  text = TEXT[TEXT.index('    mla_moe/') :].split('    configs/')[0]
  tree, folder = {}, ''
  for line in text.splitlines():
    for word in line.partition('#')[0].split():
      if word.endswith('/'):
        folder = word
      else:
        tree.setdefault(folder, set()).add(word)
  programs = tree.pop('experiments/')
  folder = ROOT / 'experiments'
  mains = {p.parent.name for p in folder.glob('*/__main__.py')}
  for path in folder.glob('[a-z]*.py'):
    if "\nif __name__ == '__main__':" in path.read_text():
      mains.add(path.stem)
  assert programs == mains
  package = ROOT / 'mla_moe'
  tree[''] = tree.pop('mla_moe/')
  for path in package.glob('*/__init__.py'):
    assert f'{path.parent.name}/' in tree
  for folder, names in tree.items():
    assert names == {p.stem for p in (package / folder).glob('[a-z]*.py')}, (
      folder
    )


def test_the_variants_are_those_of_the_configs():
  rows = re.findall(r'\| `configs/(\w+)\.py` \|[^|]*\| ([^|]*) \|', TEXT)
  assert len(rows) == len(list((ROOT / 'configs').glob('[a-z]*.py')))
  for name, variants in rows:
    made = importlib.import_module(f'configs.{name}').get_config
    with pytest.raises(ConfigError) as refused:
      made('nothing')
    assert str(refused.value).endswith(f'there is only {variants}'), name
