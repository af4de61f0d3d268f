"""Two processes of one run: rows 3, 8, 12 and 29, and the hashes of a seal."""

import jax.numpy as jnp
import numpy as np
import pairs
import pytest

from experiments.checkpointing import seal, store


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """The last lines of two processes, one of which got SIGTERM; their folder."""
  folder = tmp_path_factory.mktemp('pair')
  return pairs.stopped(folder), folder


def test_row12_a_signal_to_one_process_stops_both_at_the_same_step(pair):
  (first, second), folder = pair
  assert first[0] == second[0]
  name, step = first[0].split()
  assert name == 'SIGTERM' and int(step) >= 5
  # One process reads the checkpoint of two.
  like = {'w': jnp.zeros(8), 'n': jnp.zeros(()), 'v': jnp.zeros(4096)}
  restored = store.restore(folder, like, before=int(step) + 1)
  assert restored.step == int(step)
  np.testing.assert_array_equal(restored.state['w'], np.arange(8) + int(step))


def test_a_process_hashes_its_own_files_and_no_other(pair):
  (first, second), folder = pair
  names = [set(lines[1].split()) for lines in (first, second)]
  own = {name for name in names[1] if 'ocdbt.process_1/' in name}
  assert own == names[1] and own and not names[0] & names[1]
  sealed = seal.read(folder / first[0].split()[1])
  assert sealed['files'].keys() == names[0] | names[1]
  assert sealed['processes'] == 2


def test_row08_a_save_that_fails_on_one_process_is_told_on_both(pair):
  (first, second), folder = pair
  assert first[2] == second[2] == '1 not saved'
  step = int(first[0].split()[1])
  assert not (folder / str(step + 1) / seal.NAME).exists()


def test_row03_a_bit_that_flips_in_one_process_s_file_is_refused_by_both(pair):
  (first, second), _ = pair
  assert first[3] == second[3] and first[3].startswith('0 CHECKPOINT')
  assert 'ocdbt.process_1/d/' in first[3] and 'SHA-256' in first[3]


def test_row29_processes_see_that_their_replicas_differ(pair):
  (first, second), _ = pair
  assert first[4] == second[4] == 'w on the device at (1, 0)'


def test_processes_read_a_text_once(pair):
  """The second opens the folder that the first names."""
  (first, second), _ = pair
  assert first[5] == second[5] and len(first[5]) == 24
