"""What a user waits for before anything is computed."""

import subprocess
import sys
import time

import pytest

HEAVY = (
  'orbax tensorstore matplotlib tensorboard grain pyarrow tokenizers lm_eval'
)


def test_importing_the_package_imports_nothing_heavy():
  code = (
    'import sys, mla_moe; '
    f'print([n for n in {HEAVY.split()} if n in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == '[]'


@pytest.mark.parametrize(
  'module', ['train', 'plan', 'generate', 'convert', 'evaluate']
)
def test_help_imports_nothing_heavy(module):
  code = (
    f'import runpy, sys; sys.argv = ["x", "--help"]\n'
    f'try: runpy.run_module("experiments.{module}", run_name="__main__", '
    'alter_sys=True)\n'
    'except SystemExit as end: assert not end.code\n'
    f'print([n for n in {HEAVY.split()} if n in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == '[]'


@pytest.mark.slow
def test_import_takes_less_than_one_and_a_half_times_jax_and_flax():
  def seconds(code):
    began = time.perf_counter()
    subprocess.run([sys.executable, '-c', code], check=True)
    return time.perf_counter() - began

  pairs = [
    (seconds('import mla_moe'), seconds('import jax, flax.linen'))
    for _ in range(4)
  ]
  ours, theirs = map(min, zip(*pairs, strict=True))
  assert ours < 1.5 * theirs
