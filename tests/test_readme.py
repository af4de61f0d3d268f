"""The README's commands run, in a smoke variant, and its targets exist."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from mla_moe.config import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / 'README.md').read_text()


@pytest.mark.slow
def test_commands_run(tmp_path):
  blocks = re.findall(r'```sh\n(.*?)```', TEXT, re.S)
  lines = [line for block in blocks for line in block.splitlines() if line]
  assert len(lines) >= 2
  for line in lines:
    words = shlex.split(line.replace('runs/', f'{tmp_path}/'))
    assert words[0] == 'python'
    words = [sys.executable, *words[1:]]
    words = [w + ':smoke' if w.startswith('--config=') else w for w in words]
    subprocess.run(words, check=True, cwd=ROOT, timeout=280)


def test_targets_and_configs_exist():
  makefile = (ROOT / 'Makefile').read_text()
  for target in re.findall(r'`make ([a-z-]+)`|    make ([a-z-]+)', TEXT):
    name = target[0] or target[1]
    assert re.search(rf'^{name}:', makefile, re.M), name
  for path in re.findall(r'`(configs/\w+\.py)`', TEXT):
    assert (ROOT / path).exists()
  listed = set(re.findall(r'\| `configs/(\w+)\.py`', TEXT))
  assert listed == {p.stem for p in (ROOT / 'configs').glob('[a-z]*.py')}


def test_the_variants_are_those_of_the_configs():
  rows = re.findall(r'\| `configs/(\w+)\.py` \|[^|]*\| ([^|]*) \|', TEXT)
  for name, variants in rows:
    made = importlib.import_module(f'configs.{name}').get_config
    with pytest.raises(ConfigError) as refused:
      made('nothing')
    assert str(refused.value).endswith(f'there is only {variants}'), name
