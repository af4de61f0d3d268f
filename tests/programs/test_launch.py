"""Launchers: every dry run is in golden/launch; odd arguments arrive whole.

python tests/programs/test_launch.py writes the golden files anew.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'golden' / 'launch'
sys.path.insert(0, str(ROOT))

from experiments.launch import __main__ as launch  # noqa: E402
from experiments.launch import presets, slurm  # noqa: E402
from mla_moe.config import ConfigError  # noqa: E402

WHERE = ('--project=lab', '--zone=us-west4-a')
TRAIN = ('--', '--config=configs/deepseek_v2_lite.py', '--config.mesh.fsdp=16')
CASES = {
  'tpu': (
    'tpu',
    '--name=lite',
    '--topology=v5e:4x4',
    '--storage=gs://runs/mine',
    '--spot',
    '--preset=tpu-overlap',
    *WHERE,
  ),
  'tpu-slices': (
    'tpu',
    '--name=v3',
    '--topology=v5p:8x8x8',
    '--slices=2',
    '--storage=gs://runs',
    '--reservation=ours',
    *WHERE,
  ),
  'gke': (
    'gke',
    '--name=v3',
    '--topology=tpu7x:4x4x8',
    '--cluster=pod',
    '--image=reg.example/lab/mla_moe:1',
    '--storage=/storage',
    '--preset=ironwood',
    *WHERE,
  ),
  'slurm': (
    'slurm',
    '--name=v3',
    '--topology=h100:64',
    '--storage=/shared/runs',
    '--partition=gpu',
    '--hours=12',
    '--preset=gpu-overlap',
  ),
  'vm': ('vm', '--name=box', '--spot', *WHERE),
}
ACTIONS = ('create', 'install', 'start', 'logs', 'resume', 'delete')


def commands(case, action, train=TRAIN):
  backend, *flags = CASES[case]
  parsed = launch.parse([backend, action, *flags, '--dry-run', *train])
  return launch.commands(*parsed[:3])


def dry_run(case):
  parts = []
  for action in ACTIONS:
    shown = '\n'.join(c.as_typed() for c in commands(case, action))
    parts.append(f'# {action}\n{shown}\n')
  return '\n'.join(parts)


@pytest.mark.parametrize('case', CASES)
def test_dry_runs_are_the_golden_ones(case):
  assert dry_run(case) == (GOLDEN / f'{case}.txt').read_text()


@pytest.mark.parametrize('case', CASES)
def test_what_is_shown_is_what_is_run(case):
  """Bash reads the printed line as the argument list that is executed."""
  for action in ACTIONS:
    for command in commands(case, action):
      shown = (
        command.as_typed().split('\n')[0]
        if command.stdin
        else (command.as_typed())
      )
      words = shlex.split(shown.split(" <<'END'")[0], comments=True)
      assert tuple(words) == command.words


ODD = (
  '--',
  '--config=configs/tiny.py:smoke',
  '--config.data.source=/data/my text; rm -rf "$HOME"/*',
  "--config.data.tokenizer=it's `here` $(whoami)\\n",
  '--config.data.seed=7 && true # no',
)


def remote_line(case):
  """(shell line, stub of python) as the far machine's shell gets it."""
  (command,) = commands(case, 'start', ODD)
  if case == 'slurm':
    return command.stdin, '.venv/bin/python'
  words = [w for w in command.words if w.startswith('--command=')]
  stub = 'bin/python' if case == 'gke' else 'mla_moe/.venv/bin/python'
  return words[0].removeprefix('--command='), stub


@pytest.mark.parametrize('case', ['tpu', 'gke', 'slurm', 'vm'])
def test_row43_odd_arguments_arrive_whole(case, tmp_path):
  line, stub = remote_line(case)
  path = tmp_path / stub
  path.parent.mkdir(parents=True)
  code = 'import json, os, sys; '
  code += 'json.dump([sys.argv[1:], dict(os.environ)], open("arrived", "w"))'
  path.write_text(
    f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c '
    f'{shlex.quote(code)} "$@"\n'
  )
  path.chmod(0o755)
  bin_ = tmp_path / 'bin'
  bin_.mkdir(exist_ok=True)
  (bin_ / 'srun').write_text('#!/bin/sh\nexec "$@"\n')
  (bin_ / 'srun').chmod(0o755)
  environment = {**os.environ, 'PATH': f'{bin_}:{os.environ["PATH"]}'}
  process = subprocess.run(
    ['bash', '-c', f'{line}\nwait'],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
    timeout=30,
  )
  assert process.returncode == 0, process.stderr
  (arrived,) = list(tmp_path.glob('**/arrived'))
  words, environ = json.loads(arrived.read_text())
  assert words[:2] == ['-m', 'experiments.train']
  assert words[2:-1] == list(ODD[1:])
  assert words[-1].startswith('--workdir=')
  preset = dict(zip(CASES, (presets.PRESETS,) * 5, strict=True))[case]
  for flag in CASES[case]:
    if flag.startswith('--preset='):
      for name, value in preset[flag.split('=')[1]].environment.items():
        assert environ[name] == value


@pytest.mark.parametrize('case', ['tpu', 'gke', 'slurm', 'vm'])
def test_shell_lines_parse_and_shellcheck_is_silent(case, tmp_path):
  lines = [remote_line(case)[0]]
  for command in commands(case, 'install'):
    flags = [w for w in command.words if w.startswith('--command=')]
    lines += [w.removeprefix('--command=') for w in flags]
  checker = shutil.which('shellcheck')
  for i, line in enumerate(lines):
    path = tmp_path / f'{i}.sh'
    path.write_text(line if line.startswith('#!') else f'#!/bin/bash\n{line}\n')
    subprocess.run(['bash', '-n', path], check=True)
    if checker:
      process = subprocess.run(
        [checker, '--exclude=SC2016', path],  # what is quoted is to stay so
        capture_output=True,
        text=True,
      )
      assert process.returncode == 0, process.stdout


def test_slurm_requeues_after_a_signal_and_not_after_the_end(tmp_path):
  backend, *flags = CASES['slurm']
  job = launch.parse([backend, 'start', *flags, *TRAIN])[2]
  for name, text in {
    'srun': 'trap "exit 0" TERM; echo up; sleep $LONG & wait; exit 3',
    'scancel': 'kill -TERM "$(cat child)"; echo "$*" >> called',
    'scontrol': 'echo "$*" >> called',
  }.items():
    path = tmp_path / name
    path.write_text(
      f'#!/bin/bash\n[ {name} = srun ] && echo $$ > child\n{text}\n'
    )
    path.chmod(0o755)
  script = tmp_path / 'job.sh'
  script.write_text(slurm.script(job))
  environment = {
    **os.environ,
    'PATH': f'{tmp_path}:{os.environ["PATH"]}',
    'SLURM_JOB_ID': '77',
  }
  options = {'cwd': tmp_path, 'text': True, 'stdout': subprocess.PIPE}
  process = subprocess.run(
    ['bash', script], env={**environment, 'LONG': '0'}, timeout=30, **options
  )
  assert process.returncode == 3 and not (tmp_path / 'called').exists()
  with subprocess.Popen(
    ['bash', script], env={**environment, 'LONG': '20'}, **options
  ) as running:
    assert running.stdout.readline() == 'up\n'
    running.terminate()
    running.wait(timeout=25)
  called = (tmp_path / 'called').read_text().splitlines()
  assert called == ['--signal=TERM 77.0', 'requeue 77']


@pytest.mark.parametrize(
  'words, message',
  [
    (['tpu', 'up', '--name=a'], '--project: is needed'),
    (['tpu', 'up', '--name=A b'], 'lower-case'),
    (
      ['tpu', 'up', '--name=a', '--topology=tpu7x:4x4x4', '--storage=gs://b']
      + list(WHERE),
      "use 'gke'",
    ),
    (
      ['tpu', 'up', '--name=a', '--topology=v5e:4x4', '--storage=/x', *WHERE],
      'give a bucket',
    ),
    (
      ['slurm', 'up', '--name=a', '--topology=h100:12', '--storage=/x'],
      'nodes',
    ),
    (['vm', 'start', '--name=a', '--preset=ironwood', *WHERE], 'gpu-overlap'),
  ],
)
def test_bad_requests_are_one_line(words, message):
  with pytest.raises(ConfigError, match=re.escape(message)) as caught:
    launch.commands(*launch.parse(words)[:3])
  assert '\n' not in str(caught.value)


def test_no_machine_is_asked_for_with_a_config_that_is_not_there(
  monkeypatch, capsys
):
  words = ['tpu', 'up', '--name=a', '--topology=v5e:4x4', '--storage=gs://b']
  words += [*WHERE, '--dry-run', '--', '--config=configs/tinny.py:smoke']
  monkeypatch.setattr(sys, 'argv', ['launch', *words])
  with pytest.raises(SystemExit) as ended:
    launch.main()
  message = capsys.readouterr()
  assert ended.value.code == 2 and not message.out
  assert 'did you mean configs/tiny.py?' in message.err


def test_a_missing_program_is_named():
  from experiments.launch.job import command

  with pytest.raises(ConfigError, match='no-such-program: is not installed'):
    launch.execute(command('no-such-program'))


def write() -> None:
  """Writes the golden files."""
  for case in CASES:
    (GOLDEN / f'{case}.txt').write_text(dry_run(case))


if __name__ == '__main__':
  write()
