"""Several processes: how they are detected, their rows, one run of two."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from experiments import distributed
from mla_moe import sharding
from mla_moe.config import ConfigError, MeshConfig

ROOT = pathlib.Path(__file__).parents[2]
ARGUMENTS = (
  '--config=configs/tiny.py:smoke',
  '--config.run.steps=3',
  '--config.run.sample_every=3',
  '--config.run.save_every=2',
  '--config.run.eval_every=3',
  '--config.model.layers=2',
  '--config.model.mtp.depth=0',
  '--config.optim.optimizer=adamw',
  '--config.model.dim=32',
  '--config.data.seq_len=64',
  '--config.mesh.data=2',
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
  assert distributed.part(None, 8) == (0, 1)
  mesh = sharding.make_mesh(MeshConfig(data=2, tensor=4))
  assert distributed.part(mesh, 8) == (0, 1)
  assert distributed.alone(lambda: 3) == 3
  assert distributed.processes() == 1 and distributed.first()
  assert jax.process_count() == 1


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
  """A training run, alone on 8 devices or as one of two on 4 each."""
  alone = index is None
  devices = 8 if alone else 4
  flag = f'--xla_force_host_platform_device_count={devices}'
  environ = {**os.environ, 'XLA_FLAGS': flag, 'JAX_PLATFORMS': 'cpu'}
  if not alone:
    environ |= {
      'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
      'JAX_NUM_PROCESSES': '2',
      'JAX_PROCESS_ID': str(index),
    }
  command = [sys.executable, '-m', 'experiments.train', *ARGUMENTS, *more]
  child = subprocess.Popen(
    [*command, f'--workdir={folder}'],
    cwd=ROOT,
    env=environ,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  _STARTED.append(child)
  return child


def free_port():
  """A port that nobody has now, and that few will choose by chance."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]


def rows(folder):
  text = (folder / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_as_one(tmp_path):
  port = free_port()
  both = [start(tmp_path / 'two' / 'run', i, port) for i in range(2)]
  texts = [p.communicate(timeout=800) for p in both]
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
  more = ('--replay=3',)
  port = free_port()
  both = [start(tmp_path / 'two' / 'run', i, port, more) for i in range(2)]
  texts = [p.communicate(timeout=800) for p in both]
  assert [p.returncode for p in both] == [0, 0], texts
  assert 'Step 3, computed again from step 2' in texts[0][0]
  assert 'Step' not in texts[1][0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_of_two_minds_both_stop(tmp_path):
  other = ('--config.optim.learning_rate=0.5',)
  port = free_port()
  both = [
    start(tmp_path / 'run', i, port, other if i else ()) for i in range(2)
  ]
  texts = [p.communicate(timeout=800)[1] for p in both]
  assert [p.returncode for p in both] == [2, 2], texts
  assert all('process 1 has another config' in text for text in texts)


@pytest.mark.slow
def test_a_process_that_never_comes_is_named(tmp_path):
  child = start(tmp_path / 'run', 0, free_port(), ('--distributed_timeout=5',))
  text = child.communicate(timeout=200)[1]
  assert 'process 1 did not arrive within 5 s' in text, text
  assert child.returncode == 2
