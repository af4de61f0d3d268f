"""Checkpoints in a bucket: rows 1 to 8 of docs/reliability.md, and pruning."""

import sys

import pytest
from bucket_server import NAME, server  # noqa: F401
from states import LIKE, make, restored, save

from experiments import checkpoint as program
from experiments import faults
from experiments.checkpointing import (
  folders,
  retention,
  saving,
  seal,
  storage,
  store,
)
from mla_moe import ConfigError

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures('server'),
  pytest.mark.filterwarnings('default'),  # of third-party code
]


@pytest.fixture
def folder(request):
  return f'gs://{NAME}/{request.node.name}/checkpoints'


def blob(path):
  name = path.removeprefix(f'gs://{NAME}/')
  return storage.client().bucket(NAME).blob(name)


def largest(step):
  objects = storage.objects(step)
  return f'{step}/{max(objects, key=lambda name: objects[name][0])}'


def test_row03_saved_pruned_read_and_a_flipped_object_is_refused(folder):
  save(folder, 1, 2, 3, keep=2)
  assert folders.steps(folder) == [2, 3]
  assert {n.split('/')[0] for n in storage.objects(folder)} == {'2', '3'}
  sealed = seal.read(storage.path(folder) / '3')
  found = storage.objects(f'{folder}/3')
  assert sealed['files'] == {n: found[n] for n in found if n != seal.NAME}
  assert restored(folder) == (3, '')
  path = largest(f'{folder}/3')
  content = bytearray(blob(path).download_as_bytes())
  content[len(content) // 2] ^= 1
  blob(path).upload_from_string(bytes(content))
  with pytest.raises(store.Damaged, match='CRC-32C'):
    store.check(folder, 3)
  step, said = restored(folder, set_aside=retention.set_aside)
  assert step == 2 and path in said and said.count('CHECKPOINT') == 1
  assert folders.steps(folder) == [2]
  assert storage.objects(f'{folder}/refused/3-0').keys() >= {seal.NAME}
  save(folder, 3, keep=2)
  assert folders.steps(folder) == [2, 3] and restored(folder) == (3, '')


def test_row04_an_object_that_is_gone_or_new_is_named(folder):
  save(folder, 1, 2)
  blob(f'{folder}/2/state/_METADATA').delete()
  assert restored(folder)[0] == 1
  blob(f'{folder}/1/another').upload_from_string(b'x')
  with pytest.raises(store.Damaged, match='1/another: is not of this'):
    store.check(folder, 1)


def test_row02_a_lost_seal_or_commit_is_no_step(folder):
  save(folder, 1, 2, 3)
  blob(f'{folder}/3/{folders.COMMIT}').delete()
  assert folders.steps(folder) == [1, 2]
  blob(f'{folder}/2/{seal.NAME}').delete()
  step, said = restored(folder)
  assert step == 1 and 'was cut off before its seal' in said
  with saving.Writer(folder, 9):  # which clears up
    assert {n.split('/')[0] for n in storage.objects(folder)} == {'1', '2'}


def test_row08_a_failed_save_blocks_no_later_one(folder, monkeypatch):
  monkeypatch.setenv(faults.VARIABLE, 'full@before_seal:1')
  with saving.Writer(folder, 9, before_seal=lambda: None) as writer:
    writer.save(1, make(1), {})
    with pytest.raises(saving.NotSaved, match='/1: could not be saved'):
      writer.wait()
    monkeypatch.delenv(faults.VARIABLE)
    writer.save(1, make(1), {})
  assert restored(folder) == (1, '')
  assert store.restore(f'{folder}/nowhere', LIKE) is None


def test_verify_reads_a_listing_and_a_copy_is_verified_where_it_was_sealed(
  folder, tmp_path, monkeypatch, capsys
):
  save(folder, 1)
  words = ['checkpoint', 'verify', folder.removesuffix('/checkpoints')]
  monkeypatch.setattr(sys, 'argv', words)
  with pytest.raises(SystemExit) as ended:
    program.main()
  assert not ended.value.code and '1: whole' in capsys.readouterr().out
  for name in storage.objects(f'{folder}/1'):
    path = tmp_path / '1' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(blob(f'{folder}/1/{name}').download_as_bytes())
  assert restored(tmp_path) == (1, '')
  with pytest.raises(ConfigError, match='verify it in its bucket'):
    store.check(tmp_path, 1)


def test_a_service_that_fails_refuses_no_step(folder, monkeypatch):
  save(folder, 1, 2)
  moved = []

  def fails(*_, **__):
    raise OSError('away')

  with monkeypatch.context() as patch:
    patch.setattr(store.ocp.StandardCheckpointHandler, 'restore', fails)
    with pytest.raises(ConfigError, match='/2: cannot be read .*away') as error:
      restored(folder, set_aside=lambda *step: moved.append(step))
    assert not isinstance(error.value, store.Damaged)
  with monkeypatch.context() as patch:
    patch.setattr(seal, 'check', fails)
    with pytest.raises(OSError, match='away'):
      restored(folder, set_aside=lambda *step: moved.append(step))
  assert not moved and restored(folder) == (2, '')


def test_a_deletion_that_fails_is_a_notice_and_is_finished_later(
  folder, monkeypatch
):
  save(folder, 1)
  kind = type(storage.path(folder))
  unlink = kind.unlink

  def fails(path, *words, **options):
    if path.parent.name == '1' and path.name == seal.NAME:
      raise RuntimeError('away')
    return unlink(path, *words, **options)

  with saving.Writer(folder, 1) as writer:
    writer.save(2, make(2), {})
    monkeypatch.setattr(kind, 'unlink', fails)
    writer.wait()
    monkeypatch.undo()
    assert '/1: could not be deleted (away)' in writer.notices()[0]
  assert folders.steps(folder) == [2]
  with saving.Writer(folder, 1):
    assert {n.split('/')[0] for n in storage.objects(folder)} == {'2'}


def test_a_run_that_was_copied_into_a_bucket_goes_on(folder, tmp_path):
  save(tmp_path, 1, 2)
  for path in tmp_path.rglob('*'):
    if path.is_file():
      name = path.relative_to(tmp_path).as_posix()
      blob(f'{folder}/{name}').upload_from_filename(path)
  assert restored(folder) == (2, '')
  with pytest.raises(ConfigError, match='verify it on a disk'):
    store.check(folder, 2)
  blob(f'{folder}/2/state/_METADATA').upload_from_string(b'')
  assert restored(folder)[0] == 1
