"""Two processes of one run: signals, checkpoints and replicas (rows 12, 29)."""

import os
import pathlib
import signal

import children
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.checkpoint import store


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """The last lines of two processes, one of which got SIGTERM; their folder."""
  folder = tmp_path_factory.mktemp('pair')
  flags = '--xla_force_host_platform_device_count=2'
  environment = os.environ | {'XLA_FLAGS': flags}
  script = pathlib.Path(__file__).parent / 'one_of_two.py'
  both = [
    children.Child(script, rank, folder, env=environment) for rank in range(2)
  ]
  try:
    while both[1].stdout.readline() not in ('ready\n', ''):
      pass  # gloo prints, too
    both[1].send_signal(signal.SIGTERM)
    outputs = [child.communicate() for child in both]
  finally:
    for child in both:
      child.kill()
  assert [child.returncode for child in both] == [0, 0], outputs
  return [out.splitlines()[-2:] for out, _ in outputs], folder


def test_row12_a_signal_to_one_process_stops_both_at_the_same_step(pair):
  (first, second), folder = pair
  assert first[0] == second[0]
  name, step = first[0].split()
  assert name == 'SIGTERM' and int(step) >= 5
  # One process reads the checkpoint of two.
  like = {'w': jnp.zeros(8), 'n': jnp.zeros(())}
  restored = store.restore(folder, like)
  assert restored.step == int(step)
  np.testing.assert_array_equal(restored.state['w'], np.arange(8) + int(step))


def test_row29_processes_see_that_their_replicas_differ(pair):
  (first, second), _ = pair
  assert first[1] == second[1] == 'w on the device at (1, 0)'
