"""The program `experiments.checkpoint` on sealed and damaged steps."""

import pathlib
import sys

import pytest

from experiments import checkpoint as program
from experiments import workdir
from experiments.checkpointing import folders
from mla_moe.config import ConfigError


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


def test_a_relative_path_finds_the_lock(damaged, monkeypatch):
  run = damaged.parent
  damaged.rename(run / 'checkpoints')
  monkeypatch.chdir(run / 'checkpoints')
  with workdir.lock(run), pytest.raises(ConfigError, match='is writing to it'):
    program.rm(program.find(pathlib.Path()), [1], refused=False, force=False)
  assert folders.steps(run / 'checkpoints') == [1, 2]
