"""Imports are light: no command loads a heavy package before it needs it."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
HEAVY = (
  'orbax tensorstore matplotlib tensorboard grain pyarrow tokenizers lm_eval'
)


def test_importing_the_package_and_help_import_nothing_heavy():
  """One process: it goes from program to program and says what each loaded."""
  programs = 'train', 'plan', 'generate', 'convert', 'evaluate'
  code = f"""
import runpy, sys
import mla_moe
heavy = lambda: [n for n in {HEAVY.split()} if n in sys.modules]
loaded = {{'mla_moe': heavy()}}
from absl import flags
for name in {programs}:
  before = set(flags.FLAGS)
  sys.argv = ['x', '--help']
  try:
    program = f'experiments.{{name}}'
    runpy.run_module(program, run_name='__main__', alter_sys=True)
  except SystemExit as end:
    assert not end.code, name
  for flag in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, flag)
  flags.FLAGS.unparse_flags()
  loaded[name] = heavy()
print(loaded)
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  loaded = ast.literal_eval(done.stdout.splitlines()[-1])
  assert loaded == dict.fromkeys(['mla_moe', *programs], [])


def test_importing_the_package_does_nothing_and_loads_little():
  # Modules are counted, not seconds, which another process would change:
  # 1.14 times jax and flax was measured for 45 modules after 876; the goal is
  # 1.5 times. Pallas alone would be 64 modules more, and half of the time.
  code = """
import logging, sys
import flax.linen, jax
before, values = len(sys.modules), dict(jax.config.values)
import mla_moe
after = len(sys.modules)
pallas = [n for n in sys.modules if n.startswith('jax.experimental.pallas.')]
assert not pallas, pallas
assert after < 1.1 * before, (before, after)
assert dict(jax.config.values) == values
import jax._src.xla_bridge
assert not jax._src.xla_bridge._backends, 'a backend was started'
assert not logging.getLogger().handlers
from absl import flags
defined = map(flags.FLAGS.find_module_defining_flag, flags.FLAGS)
assert not [name for name in defined if 'mla_moe' in str(name)]
"""
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT)
  assert not done.returncode
