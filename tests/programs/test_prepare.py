"""The program that tokenises: what a run finds, and mistakes in a line."""

import errno
import os

import pytest

from experiments import prepare
from experiments.data import units
from mla_moe.config import ConfigError


def test_a_run_finds_the_tokens(call, tmp_path):
  """The same words as of `train`; the second time nothing is tokenised."""
  source = tmp_path / 'text'
  source.mkdir()
  for i in range(9):
    (source / f'{i}.txt').write_text(f'{i} is a line of text\n' * 200)
  words = ('--config=tiny:smoke', f'--workdir={tmp_path}/run')
  words += (f'--config.data.source={source}', '--processes=1')
  code, output, error = call('prepare', *words, '--shard=0/1')
  assert (code, error) == (0, '') and '1 of 1 units are done' in output
  code, output, _ = call('prepare', *words)
  assert code == 0 and '1 of 1 units were done before' in output
  code, output, _ = call('prepare', *words, '--verify')
  assert code == 0 and 'Tokenising' not in output
  assert 'tokens have their checksums' in output
  (folder,) = (tmp_path / '.corpus').iterdir()
  size = sum(p.stat().st_size // 2 for p in folder.glob('00000.[th]*'))
  assert f'  tokens                     {size:,}\n' in output
  path = folder / '00000.train'
  path.write_bytes(path.read_bytes()[:-1] + b'\x02')
  code, _, error = call('prepare', *words, '--verify')
  assert code == 2 and '00000.train: MiB 0 is damaged' in error


def test_sources_of_a_mixture_are_prepared_one_by_one(call, tmp_path):
  rows = []
  for name, many in (('one', 30), ('two', 60)):
    path = tmp_path / f'{name}.txt'
    path.write_text('a line\n' * 100 * many)
    rows.append((str(path), 1.0, name))
  words = ['--config=tiny:smoke', f'--workdir={tmp_path}/run', '--processes=1']
  words += [f'--config.data.sources={tuple(rows)}', '--config.run.steps=9']
  (tmp_path / 'new.txt').write_text('a new line\n' * 30)
  words += [f'--config.data.validation={((str(tmp_path / "new.txt"), "new"),)}']
  code, output, error = call('prepare', *words)
  assert (code, error) == (0, '') and len([*tmp_path.glob('.corpus/*')]) == 3
  assert 'new, for validation: 334 tokens\n' in output  # with four ends
  # 72 rows: 36 or so of each.
  epochs = [x for x in output.splitlines() if x.startswith('9 steps: ')]
  one, two = (float(line.split()[2]) for line in epochs)
  assert [x.split()[-1] for x in epochs] == ['one', 'two'] and one > two
  code, _, error = call('prepare', *words, '--config.data.max_epochs=0.1')
  assert code == 2 and "read source 'one'" in error and error.count('\n') == 1
  # --verify reads validation sets, too: the one of the fewest tokens.
  parts = tmp_path.glob('.corpus/*/00000.train')
  path = min(parts, key=lambda path: path.stat().st_size)
  path.write_bytes(path.read_bytes()[:-1] + b'\x02')
  code, output, error = call('prepare', *words, '--verify')
  assert code == 2 and output.count('tokens have their checksums') == 2
  assert '00000.train: MiB 0 is damaged' in error


def test_a_disk_that_takes_no_tokens_is_one_line(call, tmp_path, monkeypatch):
  """Full, or with a file in the place of the folder of tokens."""
  (tmp_path / 'text.txt').write_text('a line\n' * 999)
  words = ('--config=tiny:smoke', f'--workdir={tmp_path}/run')
  words += (f'--config.data.source={tmp_path}/text.txt', '--processes=1')

  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(units, 'write', full)
    code, _, error = call('prepare', *words)
  assert code == 1 and error.count('\n') == 1
  assert f'{tmp_path}/.corpus: No space left on device (ENOSPC; ' in error
  assert not [*(tmp_path / '.corpus').iterdir()]
  (tmp_path / '.corpus').rmdir()
  (tmp_path / '.corpus').write_text('')
  code, _, error = call('prepare', *words)
  assert code == 2 and error.count('\n') == 1
  assert '.corpus: cannot be a folder of tokens (File exists); name' in error


@pytest.mark.parametrize('text', ['8/8', '-1/8', '1', '1/2/3', 'a/b', '0/0'])
def test_a_shard_that_is_none_is_one_line(text):
  with pytest.raises(ConfigError, match='--shard=.*must be i/n'):
    prepare.share_of(text)
