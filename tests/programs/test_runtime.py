"""The settings of a process: memory that stays, options, its peak."""

import subprocess
import sys

import pytest

from experiments import runtime

_PROGRAM = """
import resource
from experiments import runtime
runtime.keep_memory()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: ((x @ x.T) @ x).sum())
x = jnp.ones((4096, 64))
for _ in range(4):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc keeps the memory')
def test_a_step_does_not_fault_its_scratch_memory_in_again():
  """Its first product is 16,384 pages of 4 KiB."""
  done = subprocess.run(
    [sys.executable, '-c', _PROGRAM], capture_output=True, text=True, check=True
  )
  assert int(done.stdout) < 4096


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
  """An unknown one would stop every training step."""
  fresh = runtime.step_options.__wrapped__
  assert set(fresh()) <= set(runtime._STEP)
  monkeypatch.setattr(runtime, '_STEP', {'xla_cpu_no_such_option': True})
  assert fresh() == {}


def test_peak_memory_is_this_process_alone():
  """Its parent's peak is left out: a benchmark starts its contenders."""
  large = bytearray(2**29)
  large[:: 2**12] = b'x' * len(large[:: 2**12])
  ask = 'from experiments import runtime; print(runtime.peak_memory())'
  child = subprocess.run([sys.executable, '-c', ask], stdout=subprocess.PIPE)
  assert 2**22 < int(child.stdout) < 2**28
  assert runtime.peak_memory() > len(large)
