"""A folder of a disk and one of a bucket are used by the same names."""

import inspect

import pytest

from experiments.checkpointing import retention, storage
from mla_moe.config import ConfigError


def test_both_kinds_have_the_same_methods():
  """So nothing else asks which of the two a folder is."""

  def methods(kind):
    public = {name: x for name, x in vars(kind).items() if name[0] != '_'}
    values = {name for name, x in public.items() if not callable(x)}
    assert values == {'mode', 'checksum', 'is_service'}
    return {
      name: list(inspect.signature(public[name]).parameters)
      for name in public.keys() - values
    }

  assert methods(storage.Disk) == methods(storage.Bucket)
  assert storage.is_bucket('gs://b/x') and not storage.is_bucket('gs:/b/x')


def test_a_disk_s_folder(tmp_path):
  place = storage.of(tmp_path / 'run' / '3')
  assert not place.exists()
  place.make()
  assert place.exists() and place.path.stat().st_mode & 0o777 == 0o700
  place.write('a', 'text')
  place.write('a', 'other')
  assert place.read('a') == b'other' and place.listed() == {'a': [5]}
  size, digest = place.records()['a']
  assert size == place.size() == 5 and len(digest) == 64
  (place.path / 'ocdbt.process_1').mkdir()
  place.write('ocdbt.process_1/b', '')
  assert [*place.records(0, 2)] == ['a']
  assert [*place.records(1, 2)] == ['ocdbt.process_1/b']
  assert [*place.records(0, 1)] == ['a', 'ocdbt.process_1/b']
  (place.path / 'link').symlink_to('/nowhere')
  with pytest.raises(ConfigError, match='link: is no regular file'):
    place.listed()
  place.delete()
  assert not place.exists() and not [*(tmp_path / 'run').iterdir()]
  assert 'MiB are free' in storage.of(tmp_path).free()
  assert place.free() == '; the folder is gone'


def test_a_deletion_of_refused_steps_that_was_cut_off_is_finished(tmp_path):
  (tmp_path / f'{retention.REFUSED}.removed').mkdir()
  (tmp_path / 'mine.removed').mkdir()
  retention.clean(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['mine.removed']


def test_a_deletion_that_was_cut_off_takes_no_later_step(tmp_path):
  """The step may have been saved again since, by a run that went back."""
  (tmp_path / '3').mkdir()
  (tmp_path / '3.removed').mkdir()
  run = storage.of(tmp_path)
  for path in run.half_deleted():
    storage.of(path).delete()
  assert [path.name for path in tmp_path.iterdir()] == ['3']
