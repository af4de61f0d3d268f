"""Several processes: how they are detected, their rows, one run of two."""

import json
import pathlib

import children
import jax
import numpy as np
import ports
import pytest

from experiments import distributed
from experiments.training import preparation
from mla_moe import sharding
from mla_moe.config import ConfigError, MeshConfig

ROOT = pathlib.Path(__file__).parents[2]
ARGUMENTS = (
  '--config=configs/tiny.py:micro',
  '--config.run.steps=3',
  '--config.run.sample_every=3',
  '--config.run.save_every=2',
  '--config.run.eval_every=3',
  '--config.run.eval_batches=1',
  '--config.mesh.fsdp=2',
  '--config.mesh.expert=2',
)


@pytest.mark.parametrize(
  'environ, source',
  [
    ({}, ''),
    ({'SLURM_STEP_NUM_TASKS': '1'}, ''),
    ({'SLURM_STEP_NUM_TASKS': '4'}, 'Slurm'),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, ''),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 'Cloud TPU'),
    ({'TPU_WORKER_HOSTNAMES': 'a,b', 'KUBERNETES_SERVICE_HOST': 'x'}, 'GKE'),
  ],
)
def test_the_environment_names_other_processes(environ, source):
  assert distributed.detect(environ) == (source, {})


def test_a_coordinator_needs_numbers():
  environ = {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '2'}
  with pytest.raises(ConfigError, match='JAX_PROCESS_ID'):
    distributed.detect(environ)
  with pytest.raises(ConfigError, match='must be a number'):
    distributed.detect({**environ, 'JAX_PROCESS_ID': 'first'})
  _, arguments = distributed.detect({**environ, 'JAX_PROCESS_ID': '1'})
  assert arguments == {
    'coordinator_address': 'a:1',
    'num_processes': 2,
    'process_id': 1,
  }


def test_one_process_reads_everything():
  devices = jax.devices()
  assert distributed.rows(None, 8, devices).tolist() == list(range(8))
  mesh = sharding.make_mesh(MeshConfig(data=2, tensor=4))
  assert distributed.rows(mesh, 8, devices).tolist() == list(range(8))
  assert distributed.alone(lambda: 3) == 3
  assert distributed.processes() == 1 and distributed.first()
  assert jax.process_count() == 1


@pytest.mark.parametrize(
  'sizes, right',
  [
    (dict(fsdp=8), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (dict(fsdp=2, tensor=4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (dict(tensor=8), [list(range(8))] * 2),
    (dict(stage=2, fsdp=4), [[0, 2, 4, 6], [1, 3, 5, 7]]),
    (dict(data=2, stage=4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (dict(stage=2, fsdp=2, expert=2), [[0, 2, 4, 6], [1, 3, 5, 7]]),
  ],
)
def test_a_host_reads_the_rows_of_its_devices_alone(sizes, right):
  """Also those of a pipeline's stage, which are not neighbours."""
  mesh = sharding.make_mesh(MeshConfig(**sizes))
  whole = np.arange(2 * 8 * 3).reshape(2, 8, 3)
  split = jax.NamedSharding(mesh, sharding.spec((None, 'batch', None)))
  places = split.devices_indices_map(whole.shape)
  for devices, numbers in zip(mesh.devices.reshape(2, 4), right, strict=True):
    rows = distributed.rows(mesh, 8, list(devices))
    assert rows.tolist() == numbers
    for device in devices:
      part = preparation._of_device(whole[:, rows], rows, places[device])
      np.testing.assert_array_equal(part, whole[places[device]])


@pytest.fixture(autouse=True)
def no_orphans():
  """Ends the processes that a failed test leaves running."""
  yield
  while _STARTED:
    child = _STARTED.pop()
    with child:  # closes its pipes, and waits
      child.kill()


_STARTED = []


def start(folder, index=None, port=0, more=()):
  """A training run, alone on 4 devices or as one of two on 2 each."""
  alone = index is None
  environ = children.on_devices(4 if alone else 2)
  if not alone:
    environ |= {
      'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
      'JAX_NUM_PROCESSES': '2',
      'JAX_PROCESS_ID': str(index),
    }
  words = '-m', 'experiments.train', *ARGUMENTS, *more, f'--workdir={folder}'
  child = children.Child(*words, env=environ)
  _STARTED.append(child)
  return child


def ended(folder, more=(), other=()):
  """The processes of a run of two, ended, and their (output, errors)."""

  def both(port):
    flags = more, (*more, *other)
    started = [start(folder, i, port, flags[i]) for i in range(2)]
    return started, [child.communicate(timeout=800) for child in started]

  return ports.tried(both)


def rows(folder):
  text = (folder / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_as_one(tmp_path):
  both, texts = ended(tmp_path / 'two' / 'run')
  assert [p.returncode for p in both] == [0, 0], texts
  assert '2 processes (found by environment)' in texts[0][0]
  assert 'step' not in texts[1][0]
  alone = start(tmp_path / 'one' / 'run')
  assert alone.communicate(timeout=800) and alone.returncode == 0
  pairs = zip(
    rows(tmp_path / 'two' / 'run'), rows(tmp_path / 'one' / 'run'), strict=True
  )
  for ours, theirs in pairs:
    assert ours.keys() == theirs.keys()
    assert 'overflow' in ours or 'loss' not in ours
    for name in {'loss', 'main_loss', 'bits_per_byte'} & ours.keys():
      assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
  assert (tmp_path / 'two/run/samples.txt').exists()
  assert not (tmp_path / 'two/run/incidents.jsonl').read_text()
  both, texts = ended(tmp_path / 'two' / 'run', ('--replay=3',))
  assert [p.returncode for p in both] == [0, 0], texts
  assert 'Step 3, computed again from step 2' in texts[0][0]
  assert 'Step' not in texts[1][0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_of_two_minds_both_stop(tmp_path):
  other = ('--config.optim.learning_rate=0.5',)
  both, texts = ended(tmp_path / 'run', other=other)
  assert [p.returncode for p in both] == [2, 2], texts
  assert all('process 1 has another config' in text for _, text in texts)


@pytest.mark.slow
def test_a_process_that_never_comes_is_named(tmp_path):
  flags = ('--distributed_timeout=5',)

  def alone(port):
    child = start(tmp_path / 'run', 0, port, flags)
    return [child], [child.communicate(timeout=200)]

  (child,), ((_, text),) = ports.tried(alone)
  assert 'process 1 did not arrive within 5 s' in text, text
  assert child.returncode == 2


def test_a_port_that_is_taken_is_one_line():
  with ports.held() as port:
    with pytest.raises(ConfigError, match=f'port {port}, of the roll') as error:
      distributed.absent(f'localhost:{port - 1}', 0, 2, 5)
  assert '\n' not in str(error.value)
