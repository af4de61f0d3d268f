"""Checkpoints under every kind of damage.

The row numbers are those of the table in docs/reliability.md.
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments import checkpoint as program
from mla_moe import ConfigError, sharding
from mla_moe.checkpoint import faults, fingerprint, folders, seal, store
from mla_moe.config import MeshConfig

ROOT = pathlib.Path(__file__).parents[2]
OLD = ROOT / 'tests/golden/checkpoint_unsealed'

# Warnings of third-party code that is called here are not ours to mend.
pytestmark = pytest.mark.filterwarnings('default')


def make(step):
  """Returns a state of several dtypes, different at every step."""
  return {
    'step': jnp.int32(step),
    'params': {
      'w': step + jnp.arange(64 * 64, dtype=jnp.float32).reshape(64, 64),
      'half': jnp.full(8, step / 3, jnp.bfloat16),
      'fp8': jnp.full((4, 4), step / 4, jnp.float8_e4m3fn),
    },
    'router': {},
  }


LIKE = make(0)


def save(folder, *steps, **policy):
  with store.Writer(folder, policy.pop('keep', 9), **policy) as writer:
    for step in steps:
      writer.save(step, make(step), {'corpus': 'x', 'bits_per_byte': 1 / step})


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """Steps 1 and 2, to be copied and damaged."""
  folder = tmp_path_factory.mktemp('two')
  save(folder, 1, 2)
  return folder


@pytest.fixture
def damaged(two, tmp_path):
  return shutil.copytree(two, tmp_path / 'damaged')


def restored(folder, **kwargs):
  """Returns (step, printed lines); the state must equal the saved one."""
  lines = []
  checkpoint = store.restore(folder, LIKE, say=lines.append, **kwargs)
  chex.assert_trees_all_equal(checkpoint.state, make(checkpoint.step))
  return checkpoint.step, '\n'.join(lines)


def largest(step):
  files = [path for path in step.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


SAVER = """
import sys, jax.numpy as jnp
from mla_moe.checkpoint import store
with store.Writer(sys.argv[1], 3) as writer:
  for step in range(int(sys.argv[2]), int(sys.argv[3]) + 1):
    w = step + jnp.arange(1 << 20, dtype=jnp.float32)
    writer.save(step, {'w': w}, {})
    print(step, flush=True)
    if sys.argv[4:] == ['exit']: sys.exit(3)
    if sys.argv[4:] == ['raise']: raise KeyError('of the test')
"""


def saver(*words, fault='', **kwargs):
  environment = dict(os.environ, MLA_MOE_FAULT=fault, PYTHONPATH=str(ROOT))
  return subprocess.Popen(
    [sys.executable, '-c', SAVER, *map(str, words)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **kwargs,
  )


def newest(folder):
  """Returns the step that a saver's folder restores; its bytes are right."""
  like = {'w': jnp.zeros(1 << 20, jnp.float32)}
  checkpoint = store.restore(folder, like, move_refused=True)
  if checkpoint is None:
    return 0
  step, state, _ = checkpoint
  np.testing.assert_array_equal(
    state['w'], step + np.arange(1 << 20, dtype=np.float32)
  )
  return step


def test_row01_killed_while_saving_the_last_sealed_step_is_whole(tmp_path):
  first = 1
  for seed in range(3):
    child = saver(tmp_path, first, 10**6)
    begun = [int(child.stdout.readline()) for _ in range(3)]
    time.sleep(random.Random(seed).uniform(0, 0.35))
    child.kill()
    begun += [int(line) for line in child.communicate()[0].split()]
    step = newest(tmp_path)
    # A save begins when the one before is sealed.
    assert step >= begun[-1] - 1
    first = step + 1
  with store.Writer(tmp_path, 3) as writer:
    writer.save(
      first, {'w': first + jnp.arange(1 << 20, dtype=jnp.float32)}, {}
    )
  assert newest(tmp_path) == first
  numbers = [p.name for p in tmp_path.iterdir() if p.name.isdigit()]
  assert len(numbers) == len(folders.steps(tmp_path)) == 3


def test_row01_killed_while_deleting_nothing_stays(tmp_path, monkeypatch):
  """The first file that rmtree deletes may be any of them."""
  state = {'w': jnp.ones(4)}
  with store.Writer(tmp_path, 3) as writer:
    for step in (1, 2):
      writer.save(step, state, {})

  def killed(path):
    (path / '_CHECKPOINT_METADATA').unlink()
    raise KeyboardInterrupt

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(folders.shutil, 'rmtree', killed)
    folders.remove(tmp_path, 1)
  assert folders.steps(tmp_path) == [2]
  with store.Writer(tmp_path, 3):
    assert [p.name for p in tmp_path.iterdir()] == ['2']


@pytest.mark.parametrize('point', ['before_write', 'during_write'])
def test_row02_killed_around_the_write(tmp_path, point):
  child = saver(tmp_path, 1, 9, fault=f'kill@{point}:3')
  child.communicate()
  assert child.returncode == -signal.SIGKILL
  assert newest(tmp_path) == 2


def test_row02_killed_before_the_seal_a_step_does_not_count(tmp_path, capsys):
  child = saver(tmp_path, 1, 9, fault='kill@before_seal:3')
  child.communicate()
  assert child.returncode == -signal.SIGKILL
  assert folders.steps(tmp_path)[-1] == 3
  like = {'w': jnp.zeros(1 << 20, jnp.float32)}
  assert store.restore(tmp_path, like, allow_unsealed=True).step == 3
  assert newest(tmp_path) == 2
  said = capsys.readouterr().out
  assert 'CHECKPOINT 3 REFUSED' in said and '--allow_unsealed' in said


def test_row02_killed_in_the_very_first_save_a_run_begins_again(tmp_path):
  child = saver(tmp_path, 1, 9, fault='kill@before_seal:1')
  child.communicate()
  assert folders.steps(tmp_path) == [1]
  assert newest(tmp_path) == 0
  assert folders.steps(tmp_path) == [] and (tmp_path / 'refused/1-0').exists()


def test_row03_bit_flip_in_the_arrays_is_named_and_passed_over(damaged):
  path = largest(damaged / '2')
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  step, said = restored(damaged)
  assert step == 1
  assert said.count('\n') == 0 and said.startswith('CHECKPOINT 2 REFUSED')
  assert path.name in said and 'SHA-256' in said


@pytest.mark.parametrize('left', ['half', 'empty', 'gone', 'last byte', 'more'])
@pytest.mark.parametrize('name', ['arrays', '_METADATA', 'manifest.ocdbt'])
def test_row04_truncated_empty_missing_files(damaged, left, name):
  folder = damaged / '2/state'
  path = largest(damaged / '2') if name == 'arrays' else folder / name
  content = path.read_bytes()
  path.unlink()
  if left != 'gone':
    contents = {
      'half': content[: len(content) // 2],
      'empty': b'',
      'last byte': content[:-1],
      'more': content + b'\0',
    }
    path.write_bytes(contents[left])
  step, said = restored(damaged)
  assert step == 1 and path.name in said


@pytest.mark.parametrize('name', ['state/_METADATA', 'facts/metadata'])
@pytest.mark.parametrize('sealed', [True, False])
def test_row05_corrupt_json_is_one_friendly_line(damaged, name, sealed):
  for step in ('1', '2'):
    (damaged / step / name).write_text('{"tree": ')
    if not sealed:
      (damaged / step / seal.NAME).unlink()
  with pytest.raises(store.Damaged) as error:
    restored(damaged, allow_unsealed=True)
  assert '\n' not in str(error.value) and str(damaged) in str(error.value)


def test_row06_foreign_folders_are_no_steps(damaged):
  for name in ('999', '0007', '-3', '1e3', '７', 'notes'):
    (damaged / name).mkdir()
  (damaged / '12').write_text('a file')
  assert folders.steps(damaged) == [1, 2]
  assert restored(damaged) == (2, '')
  save(damaged, 3, 999)  # in the way: moved, not deleted
  assert folders.steps(damaged) == [1, 2, 3, 999]
  assert (damaged / 'refused/999-0').is_dir()


def test_row07_a_partial_copy_is_refused(two, tmp_path):
  """Any file of the step may be missing."""
  files = sorted(p.relative_to(two) for p in (two / '2').rglob('*'))
  for missing in files:
    if (two / missing).is_dir():
      continue
    shutil.rmtree(tmp_path / 'copy', ignore_errors=True)
    shutil.copytree(two, tmp_path / 'copy')
    (tmp_path / 'copy' / missing).unlink()
    assert restored(tmp_path / 'copy')[0] == 1, missing


def test_row08_a_failed_save_is_told_and_does_not_block_later_ones(
  tmp_path, monkeypatch
):
  with store.Writer(tmp_path, 9) as writer:
    writer.save(1, make(1), {})
    monkeypatch.setenv(faults.VARIABLE, 'full@during_write:2')
    writer.save(2, make(2), {})
    with pytest.raises(store.NotSaved, match='/2: .*No space left'):
      writer.save(3, make(3), {})
    monkeypatch.delenv(faults.VARIABLE)
    writer.save(2, make(2), {})
    writer.save(3, make(3), {})
  assert restored(tmp_path) == (3, '')


LIMITED = """
import resource, signal, sys, jax.numpy as jnp
from mla_moe.checkpoint import folders, store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = sys.argv[1]
like = {'w': jnp.zeros(1 << 20, jnp.float32)}
state = lambda step: {'w': like['w'] + step + jnp.arange(1 << 20)}
with store.Writer(folder, 9) as writer:
  writer.save(1, state(1), {})
  writer.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
  try:
    writer.save(2, state(2), {})
    writer.wait()
    print('saved?')
  except store.NotSaved as error:
    print(error)
  no = resource.RLIM_INFINITY
  resource.setrlimit(resource.RLIMIT_FSIZE, (no, no))
  assert store.restore(folder, like).step == 1
  writer.save(3, state(3), {})
assert store.restore(folder, like).step == 3
assert folders.steps(folder) == [1, 3]
"""


def test_row09_a_disk_that_takes_no_more_bytes(tmp_path):
  ran = subprocess.run(
    [sys.executable, '-c', LIMITED, tmp_path / 'run'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr
  (line,) = ran.stdout.splitlines()
  assert f'{tmp_path}/run/2: could not be saved' in line
  assert 'MiB are free' in line


@pytest.mark.parametrize('exit_by, code', [('exit', 3), ('raise', 1)])
def test_row10_leaving_right_after_a_save_keeps_it(tmp_path, exit_by, code):
  child = saver(tmp_path, 1, 9, exit_by)
  child.communicate()
  assert child.returncode == code
  assert newest(tmp_path) == 1


MESHES = [dict(data=8), dict(data=2, fsdp=4), dict(expert=2, tensor=4)]


@pytest.mark.parametrize('sizes', MESHES)
def test_row15_another_mesh_restores_the_same_bits(two, tmp_path, sizes):
  """From one device to a mesh, and from there back to one device."""
  mesh = sharding.make_mesh(MeshConfig(**sizes))
  specs = {'w': PartitionSpec(('data', 'fsdp'), ('expert', 'tensor'))}

  def laid(path, x):
    spec = specs.get(fingerprint.name(path).split('.')[-1], PartitionSpec())
    return jax.device_put(x, NamedSharding(mesh, spec))

  like = jax.tree_util.tree_map_with_path(laid, LIKE)
  state = store.restore(two, like).state
  assert state['params']['w'].sharding == like['params']['w'].sharding
  chex.assert_trees_all_equal(jax.device_get(state), make(2))
  before, after = (
    fingerprint.read(fingerprint.of(x)) for x in (make(2), state)
  )
  assert before == after
  with store.Writer(tmp_path, 9) as writer:
    writer.save(2, state, {})
  assert restored(tmp_path) == (2, '')


@pytest.mark.parametrize(
  'name, dtype',
  [('w', jnp.bfloat16), ('half', jnp.float32), ('fp8', jnp.float32)],
)
def test_row17_another_dtype_is_refused(two, name, dtype):
  like = make(0)
  like['params'][name] = like['params'][name].astype(dtype)
  with pytest.raises(ConfigError, match=f'params.{name} is .*{dtype.__name__}'):
    store.restore(two, like)


def test_row17_another_tree_or_shape_is_refused(two):
  like = make(0)
  like['params']['more'] = like['params'].pop('w')
  with pytest.raises(ConfigError, match='params.more is absent'):
    store.restore(two, like)
  like = make(0)
  like['params']['half'] = jnp.zeros(9, jnp.bfloat16)
  with pytest.raises(ConfigError, match=r'params.half is \(\(8,\)'):
    store.restore(two, like)


def test_row34_the_format_without_seals_is_read_when_asked_to():
  """Committed before there were seals."""
  like = {
    'step': jnp.int32(0),
    'params': {'half': jnp.ones(4, jnp.bfloat16), 'w': jnp.ones((3, 4))},
    'router': {},
  }
  with pytest.raises(store.Damaged, match='version without seals'):
    store.restore(OLD, like)
  step, state, facts = store.restore(OLD, like, allow_unsealed=True)
  assert (step, facts, int(state['step'])) == (3, {'corpus': 'text'}, 3)
  np.testing.assert_array_equal(
    state['params']['w'], np.arange(12, dtype=np.float32).reshape(3, 4)
  )


def test_row34_a_later_format_says_who_wrote_it(damaged, monkeypatch):
  monkeypatch.setattr(seal, 'FORMAT', 7)
  seal.write(damaged / '2', {'versions': {'mla_moe': '9.9'}})
  monkeypatch.undo()
  step, said = restored(damaged)
  assert step == 1 and 'format 7, written by mla_moe 9.9' in said


def test_a_seal_that_was_edited_is_refused(damaged):
  path = damaged / '2' / seal.NAME
  path.write_text(path.read_text().replace('"corpus": "x"', '"corpus": "y"'))
  step, said = restored(damaged)
  assert step == 1 and 'not as it was written' in said


def test_what_is_restored_is_what_was_on_the_device(damaged):
  """The files match the seal, but not the numbers on the devices."""
  sealed = seal.read(damaged / '2')
  sealed['fingerprints']['params.w'] ^= 1
  facts = {k: v for k, v in sealed.items() if k not in ('format', 'files')}
  seal.write(damaged / '2', facts)
  step, said = restored(damaged)
  assert step == 1 and 'params.w is not, once read, what was saved' in said


def test_every_step_damaged_is_an_error_and_none_at_all_is_not(damaged):
  for step in (1, 2):
    (damaged / f'{step}/state/_METADATA').unlink()
  with pytest.raises(store.Damaged, match='no step can be trusted'):
    restored(damaged)
  assert store.restore(damaged / 'nowhere', LIKE) is None


def test_refused_steps_are_moved_out_of_the_way_of_new_ones(damaged):
  (damaged / '2/state/_METADATA').unlink()
  assert restored(damaged, move_refused=True)[0] == 1
  assert folders.steps(damaged) == [1]
  save(damaged, 2, keep=1)
  assert restored(damaged) == (2, '')
  assert folders.steps(damaged) == [2]


def test_the_policy_keeps_the_newest_the_spaced_and_the_best(tmp_path):
  scores = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 2.5}
  assert folders.retained(scores, 2) == {40, 50}
  assert folders.retained(scores, 1, keep_every=20) == {20, 40, 50}
  assert folders.retained(scores, 1, keep_best=2) == {20, 30, 50}
  save(tmp_path, 5, 4, 3, keep=1, keep_every=4, keep_best=1)
  assert folders.steps(tmp_path) == [4, 5]  # 1 / 5 is the best score


def test_folders_are_private_and_clocks_do_not_order_steps(
  tmp_path, monkeypatch
):
  clock = iter(range(10**9, 0, -3600))
  monkeypatch.setattr(time, 'time', lambda: next(clock))
  save(tmp_path / 'run', 1, 2, 3, keep=2)
  monkeypatch.undo()
  os.utime(tmp_path / 'run/3', (0, 0))
  assert restored(tmp_path / 'run') == (3, '')
  for path in (tmp_path / 'run', tmp_path / 'run/3'):
    assert path.stat().st_mode & 0o077 == 0


def test_a_folder_that_vanishes_is_one_line(tmp_path):
  with store.Writer(tmp_path / 'run', 9) as writer:
    shutil.rmtree(tmp_path / 'run')
    with pytest.raises(store.NotSaved, match='the folder is gone') as error:
      writer.save(1, make(1), {})
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('bit', [0, 15, 31])
def test_any_bit_of_any_element_changes_the_fingerprint(bit):
  x = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
  of = lambda x: fingerprint.read(fingerprint.of({'x': jnp.asarray(x)}))[0]['x']
  before = of(x)
  for at in (0, 50, 104):
    y = x.copy()
    y.reshape(-1).view(np.uint32)[at] ^= np.uint32(1 << bit)
    assert of(y) != before
  assert of(x.swapaxes(0, 2).reshape(x.shape)) != before


def test_the_program_lists_verifies_and_removes(damaged, capsys, monkeypatch):
  def run(*words):
    monkeypatch.setattr(sys, 'argv', ['checkpoint', *map(str, words)])
    code = 0
    try:
      program.main()
    except SystemExit as error:
      code = error.code or 0
    out = capsys.readouterr()
    return code, out.out + out.err

  code, said = run('ls', damaged)
  assert code == 0 and said.count('sealed 20') == 2
  assert run('verify', damaged)[0] == 0
  (damaged / '1/state/_METADATA').unlink()
  code, said = run('verify', damaged)
  assert code == 1 and '1: DAMAGED' in said and '2: whole' in said
  code, said = run('rm', damaged, 2)
  assert code == 2 and 'no whole step would be left' in said
  assert run('rm', damaged, 1)[0] == 0
  assert folders.steps(damaged) == [2]
  assert run('rm', damaged, 7) == (
    2,
    f'error: {damaged}: has no step 7, only [2]\n',
  )
  assert run('ls', damaged / 'nowhere')[0] == 2
