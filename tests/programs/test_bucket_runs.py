"""Runs in a bucket: one writer, records, kills, and another machine."""

import json
import os
import shutil
import signal
import threading

import children
import pairs
import pytest
from bucket_server import NAME, server  # noqa: F401

from experiments import cli, soak
from experiments.checkpointing import bucket, folders, lease, seal, storage
from mla_moe.config import Config, ConfigError

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures('server'),
  pytest.mark.filterwarnings('default'),  # of third-party code
]


def blob(url):
  return storage.client().bucket(NAME).blob(url.removeprefix(f'gs://{NAME}/'))


def test_row32_of_two_writers_the_service_lets_one_win():
  url = f'gs://{NAME}/two'
  with lease.Lock(url) as lock:
    with (
      pytest.raises(ConfigError, match=f'process {os.getpid()} on .* wait'),
      lease.Lock(url),
    ):
      pass
    # Both have read that there is no lock: the second one's write is refused.
    with pytest.raises(lease.Lost):
      lease.Lock(url).renew()
    lock._generation, right = 0, lock._generation
    lock.renew()  # as where an answer was lost: the lock is its own
    assert lock._generation == right
    lock.renew()
    assert lock._generation > right
  with lease.Lock(url):  # was given back
    pass
  assert not blob(f'{url}/lock').exists()


def test_row32_a_stale_lock_is_taken_over_and_its_holder_ends(monkeypatch):
  url, ended = f'gs://{NAME}/stale', threading.Event()

  def end(code):
    assert code == 1
    ended.set()
    raise SystemExit(code)

  monkeypatch.setattr(lease.os, '_exit', end)
  slow = lease.Lock(url, beat=3600)
  with slow:
    with lease.Lock(url, stale=-1.0) as second:  # any age is too old
      with pytest.raises(SystemExit):
        slow.hold()
      assert ended.is_set()
      second.renew()
    # The first one's end has not deleted the second's lock, nor it by itself.
  assert not blob(f'{url}/lock').exists()


def test_row32_a_dead_process_of_this_machine_holds_no_lock():
  url = f'gs://{NAME}/dead'
  holder = lease.me() | {'pid': 2**22 + 1}  # above the kernel's largest
  blob(f'{url}/lock').upload_from_string(json.dumps(holder))
  with lease.Lock(url):
    pass
  for other in ('boot', 'space'):
    holder = lease.me() | {'pid': 2**22 + 1, other: 'elsewhere'}
    blob(f'{url}/lock').upload_from_string(json.dumps(holder))
    with pytest.raises(ConfigError, match='is writing to it'), lease.Lock(url):
      pass
  blob(f'{url}/lock').upload_from_string('\x00[')
  with pytest.raises(ConfigError, match='another process'), lease.Lock(url):
    pass


def train(folder, home, texts, fault=''):
  words = ['--config=tiny:micro', f'--workdir={folder}']
  words += [f'--config.data.source={texts}', '--config.run.steps=20']
  environment = dict(os.environ, HOME=str(home), MLA_MOE_FAULT=fault)
  return children.run('-m', 'experiments.train', *words, env=environment)


def test_row01_and_14_killed_and_resumed_on_another_machine(tmp_path):
  """The bucket's run ends as a local one, in every bit and every row."""
  texts = soak.texts(tmp_path / 'texts')
  home, url = tmp_path / 'home', f'gs://{NAME}/run'
  whole = train(tmp_path / 'whole', home, texts)
  assert whole.returncode == 0, whole.stderr
  for fault in ('kill@before_seal:10', 'kill@during_write:15'):
    ran = train(url, home, texts, fault)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    shutil.rmtree(home)  # another machine, but for the dead process's name
  ran = train(url, home, texts)
  assert ran.returncode == 0, ran.stderr
  assert 'Resuming' in ran.stdout
  shutil.rmtree(home)
  os.environ['HOME'], before = str(home), os.environ['HOME']
  try:
    here = bucket.fetched(url)
    assert soak.outcome(here) == soak.outcome(tmp_path / 'whole')
  finally:
    os.environ['HOME'] = before
  names = {name.split('/')[0] for name in storage.objects(url)}
  assert names >= {'config.json', 'metrics.jsonl', 'report.html', 'checkpoints'}
  assert 'lock' not in names


def test_row12_two_processes_seal_in_a_bucket_and_refuse_a_flip(tmp_path):
  place = f'gs://{NAME}/pair'
  first, second = pairs.stopped(tmp_path, place)
  step = int(first[0].split()[1])
  assert first[0] == second[0] and not second[1]  # one listing, of process 0
  assert first[2] == second[2] == '1 not saved'
  assert first[3] == second[3] and first[3].startswith('0 CHECKPOINT')
  assert 'ocdbt.process_1/d/' in first[3] and 'CRC-32C' in first[3]
  sealed = seal.read(storage.path(place) / str(step))
  assert sealed['processes'] == 2
  assert folders.steps(place)[0] == step


def test_records_are_the_bucket_s_and_not_of_runs_below(tmp_path):
  url, here = f'gs://{NAME}/records', tmp_path / 'here'
  for name in ('config.json', 'huggingface/a', 'b/checkpoints/1/x', 'b/rows'):
    blob(f'{url}/{name}').upload_from_string(name)
  for name in ('metrics.jsonl', 'lock', 'c/bucket.json', 'c/rows'):
    (here / name).parent.mkdir(parents=True, exist_ok=True)
    (here / name).write_text('of another run')
  records = bucket.Records(url, here)
  records.fetch()
  files = {
    p.relative_to(here).as_posix() for p in here.rglob('*') if p.is_file()
  }
  assert files == {
    'config.json',
    'huggingface/a',
    'lock',
    'c/bucket.json',
    'c/rows',
  }
  (here / 'metrics.jsonl').write_text('{}')
  records.send()
  assert storage.objects(url).keys() == {
    'config.json',
    'huggingface/a',
    'b/checkpoints/1/x',
    'b/rows',
    'metrics.jsonl',
  }


def test_who_lost_the_lock_sends_no_records(tmp_path, monkeypatch):
  url = f'gs://{NAME}/fenced'
  monkeypatch.setenv('HOME', str(tmp_path))

  class Ended(BaseException):
    pass

  def end(code):
    raise Ended

  with pytest.raises(Ended), bucket.claim(url, Config()) as (folder, send):
    send()
    # A reader on the same machine leaves the writer's folder alone.
    (folder / 'metrics.jsonl').write_text('{"step": 1}\n')
    other = bucket.fetched(url)
    assert other != folder and not (other / 'metrics.jsonl').exists()
    assert (folder / 'metrics.jsonl').read_text()
    blob(f'{url}/lock').upload_from_string('{}')
    monkeypatch.setattr(lease.os, '_exit', end)
    send()
  assert 'metrics.jsonl' not in storage.objects(url)


def test_a_service_that_fails_is_one_line_and_exit_code_1(
  tmp_path, monkeypatch
):
  from google.api_core.exceptions import ServiceUnavailable

  url = f'gs://{NAME}/failing'
  monkeypatch.setenv('HOME', str(tmp_path))

  def fails(*_):
    raise ServiceUnavailable('away')

  with (
    pytest.raises(cli.Stopped, match='away; the last rows are in'),
    bucket.claim(url, Config()),
  ):
    monkeypatch.setattr(bucket.Records, 'send', fails)
  monkeypatch.undo()
  monkeypatch.setenv('HOME', str(tmp_path))
  with (
    pytest.raises(cli.Stopped, match='failing: 503 away'),
    bucket.claim(url, Config()),
  ):
    fails()
