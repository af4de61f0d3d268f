"""Restoring: damaged, foreign or older steps are refused in one line.

The row numbers are those of the table in docs/reliability.md.
"""

import errno
import gc
import os
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from states import LIKE, ROOT, make, restored, save

from experiments.checkpointing import (
  fingerprint,
  folders,
  retention,
  saving,
  seal,
  store,
)
from mla_moe import ConfigError, sharding
from mla_moe.config import MeshConfig

OLD = ROOT / 'tests/golden/checkpoint_unsealed'
# Warnings of third-party code that is called here are not ours to mend.
pytestmark = pytest.mark.filterwarnings('default')


@pytest.fixture(scope='module', autouse=True)
def forget():
  """Frees the reads that damage has broken off, while their words may pass."""
  yield
  gc.collect()


def largest(step):
  files = [path for path in step.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


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
  with saving.Writer(tmp_path, 9) as writer:
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
  seal.write(damaged / '2', {}, {'versions': {'mla_moe': '9.9'}})
  monkeypatch.undo()
  step, said = restored(damaged)
  assert step == 1 and 'format 7, written by mla_moe 9.9' in said


def test_a_seal_that_was_edited_is_refused(damaged):
  path = damaged / '2' / seal.NAME
  path.write_text(path.read_text().replace('"corpus": "x"', '"corpus": "y"'))
  step, said = restored(damaged)
  assert step == 1 and 'not as it was written' in said


@pytest.mark.parametrize('name', [seal.NAME, 'facts/metadata'])
def test_a_device_in_place_of_a_file_is_refused(damaged, name):
  (damaged / '2' / name).unlink()
  (damaged / '2' / name).symlink_to('/dev/zero')
  step, said = restored(damaged)
  assert step == 1 and 'REFUSED' in said
  (damaged / '2' / name).unlink()
  os.mkfifo(damaged / '2' / name)
  assert restored(damaged)[0] == 1


def test_a_file_s_name_cannot_write_to_the_terminal(damaged):
  (damaged / '2' / 'a\x1b]0;owned\nCHECKPOINT 3 REFUSED\udcff').touch()
  step, said = restored(damaged)
  assert step == 1 and said.isprintable()
  assert r'a\x1b]0;owned CHECKPOINT 3 REFUSED\udcff' in said


def test_what_is_restored_is_what_was_on_the_device(damaged):
  """The files match the seal, but not the numbers on the devices."""
  sealed = seal.read(damaged / '2')
  sealed['fingerprints']['params.w'] ^= 1
  facts = {k: v for k, v in sealed.items() if k not in ('format', 'files')}
  seal.write(damaged / '2', seal.records(damaged / '2'), facts)
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
  assert restored(damaged, set_aside=retention.set_aside)[0] == 1
  assert folders.steps(damaged) == [1]
  save(damaged, 2, keep=1)
  assert restored(damaged) == (2, '')
  assert folders.steps(damaged) == [2]


def test_a_step_that_a_run_deletes_meanwhile_is_no_refusal(
  tmp_path, monkeypatch
):
  """The reader lists step 1; then the run seals 2 and deletes 1 (keep=1)."""
  save(tmp_path, 1, keep=1)
  listed = folders.steps

  def stale(folder):
    monkeypatch.undo()
    steps = listed(folder)
    save(folder, 2, keep=1)
    return steps

  monkeypatch.setattr(folders, 'steps', stale)
  assert restored(tmp_path) == (2, '')


def test_a_file_system_without_fsync_is_no_damage(two, monkeypatch):
  """As squashfs: its files can be read, and fsync is EINVAL."""

  def no_fsync(*_):
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

  monkeypatch.setattr(os, 'fsync', no_fsync)
  assert store.check(two, 2)['step'] == 2
