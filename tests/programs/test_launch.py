"""Launchers: every dry run is in golden/launch, and its lines run in a shell.

Programs that are not here (gcloud, docker) are stubs that record their words.
python tests/programs/test_launch.py writes the golden files anew.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import absl.flags
import hypothesis
import pytest
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'golden' / 'launch'
sys.path.insert(0, str(ROOT))

from experiments import sweep, train  # noqa: E402
from experiments.launch import __main__ as launch  # noqa: E402
from experiments.launch import presets, slurm  # noqa: E402
from experiments.launch.job import Job, as_typed, command  # noqa: E402
from mla_moe import vocabulary  # noqa: E402
from mla_moe.config import ConfigError  # noqa: E402

# ml_collections reads a config so.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')
WHERE = ('--project=lab', '--zone=us-west4-a')
TRAIN = ('--', '--config=configs/deepseek_v2_lite.py', '--config.mesh.fsdp=16')
CASES = {
  'tpu': (
    'tpu',
    '--name=lite',
    '--topology=v5e:4x4',
    '--storage=gs://runs/mine',
    '--spot',
    '--preset=v5e-overlap',
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
  'gke-bucket': (
    'gke',
    '--name=v3',
    '--topology=tpu7x:4x4x8',
    '--cluster=pod',
    '--image=reg.example/lab/mla_moe:1',
    '--storage=gs://runs/mine',
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
    parts.append(f'# {action}\n{as_typed(commands(case, action))}\n')
  return '\n'.join(parts)


@pytest.mark.parametrize('case', CASES)
def test_dry_runs_are_the_golden_ones(case):
  assert dry_run(case) == (GOLDEN / f'{case}.txt').read_text()


def stub(path, body=''):
  """A program that records its words in `calls` of the folder above, and more.

  A record ends with the character 0x1e, a word with a zero.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  calls = shlex.quote(str(path.parent.parent / 'calls'))
  path.write_text(
    f'#!/bin/bash\nprintf "%s\\0" {path.name} "$@" $\'\\x1e\' >> {calls}\n'
    f'{body}\n'
  )
  path.chmod(0o755)


def bash(line, folder, **stubs):
  """Runs a line in `folder` with these programs, through pipes as ssh does."""
  for name, body in stubs.items():
    stub(folder / 'bin' / name, body)
  return subprocess.run(
    ['bash', '-c', line],
    cwd=folder,
    env={**os.environ, 'PATH': f'{folder / "bin"}:{os.environ["PATH"]}'},
    capture_output=True,
    text=True,
    timeout=20,
  )


def calls(folder):
  """The recorded argument lists, in order; the record begins anew."""
  path = folder / 'calls'
  text = path.read_text() if path.exists() else ''
  path.unlink(missing_ok=True)
  return [record.split('\0')[:-1] for record in text.split('\x1e\0')[:-1]]


# The last answer of each program that is asked until it is ready.
STATES = """case "$*" in
  *state.state*) echo ACTIVE;;
  *value*status*) echo RUNNING;;
  *"echo ready"*) echo ready;;
esac"""


def test_what_is_shown_is_what_is_run(tmp_path):
  """Bash reads the printed lines as the argument lists that are executed."""
  programs = ('gcloud', 'xpk', 'docker', 'git', 'kubectl', 'sbatch', 'scancel')
  programs += ('mkdir', 'python3', 'tail')
  for name in programs:
    stub(tmp_path / 'bin' / name, STATES)
  stub(tmp_path / '.uv' / 'bin' / 'uv')
  for case in CASES:
    backend, *_ = CASES[case]
    run = [c for action in ACTIONS for c in commands(case, action)]
    archive = {c.source for c in run if c.source}
    for name in archive:
      (tmp_path / name).touch()
    text = as_typed([dataclasses.replace(c, beside='') for c in run])
    process = bash(text, tmp_path)
    assert process.returncode == 0, process.stderr
    shown = calls(tmp_path)
    if backend == 'slurm':  # uv, by its path, has a record of its own
      shown[2:2] = calls(tmp_path / '.uv')
    words = [[c.words[0].split('/')[-1], *c.words[1:]] for c in run]
    words = [line for line in words if line[0] != 'test']  # bash's own
    assert shown == words


ODD = (
  '--',
  '--config=configs/tiny.py:smoke',
  '--config.data.source=/data/my text; rm -rf "$HOME"/*',
  "--config.data.tokenizer=it's `here` $(whoami)\\n",
  '--config.data.seed=7 && true # no',
)
DERANDOMIZED = hypothesis.settings(
  max_examples=4,
  deadline=None,
  derandomize=True,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
# Blanks, quotes and whatever a shell replaces; no control characters.
TEXTS = st.text(
  st.sampled_from(' \'"`$(){}[]<>|&;#!*?~\\%-=/aé') | st.characters(),
  max_size=9,
)


def remote(case, action, train=ODD):
  """The shell lines that the other machine gets, in order."""
  found = commands(case, action, train)
  if case == 'slurm':
    return [c.stdin for c in found if c.stdin]
  words = [w for c in found for w in c.words if w.startswith('--command=')]
  return [word.removeprefix('--command=') for word in words]


def train_stub(case, folder, body=''):
  """Puts a stub where the case's line has its python."""
  places = {'gke': 'bin', 'slurm': '.venv/bin'}
  place = places.get(case, 'mla_moe/.venv/bin')
  stub(folder / place / 'python', body)
  return (folder / place).parent


STUBS = {'srun': 'shift; exec "$@"'}


@pytest.mark.parametrize('case', ['tpu', 'tpu-slices', 'vm'])
def test_start_returns_while_training_goes_on(case, tmp_path):
  """Otherwise ssh waits for the end of training: it holds the line's pipes."""
  done, pipes = tmp_path / 'done', {}
  with contextlib.ExitStack() as stack:
    for name in ('began', 'gate', 'ended'):
      os.mkfifo(tmp_path / name)
      pipes[name] = os.open(tmp_path / name, os.O_RDWR)  # opens at once
      stack.callback(os.close, pipes[name])
    body = f'cd {tmp_path}; echo > began; read -r < gate; touch {done}'
    train_stub(case, tmp_path, f'{body}; echo > ended')
    for line in remote(case, 'start'):
      process = bash(line, tmp_path)
      assert process.returncode == 0 and not process.stderr
      assert os.read(pipes['began'], 9) == b'\n' and not done.exists()
      os.write(pipes['gate'], b'\n')
      assert os.read(pipes['ended'], 9) == b'\n'
      done.unlink()


@pytest.mark.parametrize('case', ['tpu', 'gke', 'slurm', 'vm'])
@DERANDOMIZED
@hypothesis.given(texts=st.lists(TEXTS, min_size=1, max_size=8))
def test_row43_odd_arguments_arrive_whole(case, texts, tmp_path):
  texts = [text for text in texts if text.isprintable()]
  words = (*ODD, *(f'--x={text}' for text in texts))
  (line,) = remote(case, 'start', words)
  environ = tmp_path / 'environ'
  place = train_stub(case, tmp_path, f'env -0 > {environ}')
  process = bash(f'{line}\nwait', tmp_path, **STUBS)
  assert process.returncode == 0, process.stderr
  arrived = [w for w in calls(place) if w[0] == 'python'][-1]
  assert arrived[1:3] == ['-m', 'experiments.train']
  assert arrived[3:-1] == list(words[1:])
  assert arrived[-1].startswith('--workdir=')
  settings = dict(
    line.split('=', 1) for line in environ.read_text().split('\0')[:-1]
  )
  for flag in CASES[case]:
    if flag.startswith('--preset='):
      preset = presets.PRESETS[flag.removeprefix('--preset=')].environment
      assert preset.items() <= settings.items()


@pytest.mark.parametrize('case', ['tpu', 'vm'])
def test_a_failed_part_of_an_install_ends_it(case, tmp_path):
  (line,) = remote(case, 'install')
  parts = ['tar', 'python3']
  good = {name: '' for name in parts}
  stub(tmp_path / 'mla_moe/.uv/bin/uv')
  assert bash(line, tmp_path, **good).returncode == 0
  assert [words[0] for words in calls(tmp_path)] == parts
  made, filled = calls(tmp_path / 'mla_moe/.uv')
  assert made[1] == 'venv' and made[-1] == '.venv'
  assert filled[1:3] == ['pip', 'install']
  for i, name in enumerate(parts):
    assert bash(line, tmp_path, **good | {name: 'exit 9'}).returncode == 9
    assert [words[0] for words in calls(tmp_path)] == parts[: i + 1]
    assert not calls(tmp_path / 'mla_moe/.uv')
    stub(tmp_path / 'bin' / name)


@pytest.mark.parametrize('case', ['tpu', 'gke', 'slurm'])
@DERANDOMIZED
@hypothesis.given(text=TEXTS)
@hypothesis.example(text='my runs;$(touch pwned)`id`\'"&*')
def test_a_storage_of_any_name_arrives_whole_or_is_refused(
  case, text, tmp_path
):
  folder = f'gs://b/{text}' if case == 'tpu' else f'/shared/{text}'
  backend, *flags = CASES[case]
  words = [backend, 'up', *flags, f'--storage={folder}', *TRAIN]
  try:
    job = launch.parse(words)[2]
    find = lambda action: launch.commands(backend, action, job)
    start, create = find('start')[-1], find('create')[0]
  except ConfigError as error:
    assert str(error).isprintable()
    return
  run = f'{folder.rstrip("/")}/{job.name}'
  place = train_stub(case, tmp_path)
  line = start.stdin or start.words[-1].removeprefix('--command=')
  assert not bash(f'{line}\nwait', tmp_path, **STUBS).returncode
  assert [w[-1] for w in calls(place) if w[0] == 'python'] == [
    f'--workdir={run}'
  ]
  if case == 'slurm':
    assert f'--output={run}/log.txt' in start.words
    assert create.words == ('mkdir', '-p', run)
  calls(tmp_path)


@pytest.mark.parametrize('value', ['a b', "a'", '$(id)', 'a\nb', '`id`', ';x'])
def test_a_name_that_a_shell_could_read_is_refused(value):
  """A storage may have any printable character: see the test above."""
  texts = {f.name for f in dataclasses.fields(Job) if f.type == 'str'}
  for field in sorted(texts - {'storage'}):
    values = {'name': 'a', 'topology': 'v5e:4x4', 'storage': '/x', field: value}
    for name in ('project', 'zone', 'cluster', 'image'):
      values.setdefault(name, 'a')
    with pytest.raises(ConfigError) as refused:
      launch.commands('gke', 'start', Job(arguments=(), **values))
    assert f'--{field}=' in str(refused.value)
    assert str(refused.value).isprintable()


def test_only_the_commit_goes_into_the_image(tmp_path, monkeypatch):
  """Not .env, runs/ and .venv beside it, whatever .gitignore says."""
  monkeypatch.chdir(tmp_path)
  for name in ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE'):
    monkeypatch.delenv(name, raising=False)
  git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b.example']
  (tmp_path / 'tracked.py').write_text('')
  subprocess.run(['git', 'init', '-q'], check=True)
  subprocess.run(['git', 'add', '.'], check=True)
  subprocess.run([*git, 'commit', '-qm', 'one'], check=True)
  for name in ('.env', 'runs/a/checkpoint', '.venv/lib', 'corpus.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('')
  stub(tmp_path / 'bin' / 'docker', '[ "$1" = push ] || cat > sent')
  monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:{os.environ["PATH"]}')
  launch.execute(commands('gke', 'install'))
  assert [words[1] for words in calls(tmp_path)] == ['build', 'push']
  with tarfile.open('sent') as archive:
    assert archive.getnames() == ['tracked.py']


def test_slices_are_installed_and_started_side_by_side(tmp_path, monkeypatch):
  """Each ssh waits for the other: one after the other would never end."""
  monkeypatch.chdir(tmp_path)
  stub(tmp_path / 'bin' / 'git')
  body = """[ "$4" = scp ] && node="${9%%:*}" || node="$7"
  case "$node" in
    v3-0) echo up > to-1; read -r < to-0;;
    v3-1) read -r < to-1; echo up > to-0;;
  esac"""
  stub(tmp_path / 'bin' / 'gcloud', body)
  os.mkfifo('to-0')
  os.mkfifo('to-1')
  monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:{os.environ["PATH"]}')
  launch.execute(commands('tpu-slices', 'install'))
  launch.execute(commands('tpu-slices', 'start'))
  assert len(calls(tmp_path)) == 7
  stub(tmp_path / 'bin' / 'gcloud', 'exit 3')
  with pytest.raises(ConfigError, match='gcloud ended with 3: nothing after'):
    launch.execute(commands('tpu-slices', 'start'))


@pytest.mark.parametrize('case', ['tpu', 'gke', 'slurm', 'vm'])
def test_shell_lines_parse_and_shellcheck_is_silent(case, tmp_path):
  lines = [line for action in ACTIONS for line in remote(case, action)]
  assert lines
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
  train_stub('slurm', tmp_path)
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
    (
      ['tpu', 'up', '--name=a', '--topology=v5p:4x4x8', '--storage=gs://b']
      + ['--preset=v5e-overlap', *WHERE],
      'for v5p there is v5p-sparsecore, v5p-split',
    ),
    (
      ['tpu', 'up', '--name=a', '--topology=v5e:4x4*2', '--storage=gs://b']
      + list(WHERE),
      'give --slices=2',
    ),
    (['vm', 'up', '--name=a', '--slices=2', *WHERE], 'only TPUs have slices'),
    (['vm', 'up', '--name=a', '--hours=nan', *WHERE], 'must be above 0'),
    (['vm', 'up', '--name=a', '--zone=a b', '--project=p'], "--zone='a b'"),
    (['vm', 'up', '--name=a', '--project=p\n', '--zone=z'], r"--project='p\n'"),
    (['vm', 'up', '--name=a', *WHERE, '--', '--x=a\nb'], 'line break'),
    (['vm', 'up', '--name=a', *WHERE, '--', '--workdir=r'], 'leave it out'),
    (
      ['slurm', 'up', '--name=a', '--topology=h100:8', '--storage=/a%j'],
      'Slurm replaces %',
    ),
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
  assert 'did you mean tiny?' in message.err


@pytest.fixture
def clone(tmp_path, monkeypatch):
  """A folder with git, where a config and a text are committed."""
  monkeypatch.chdir(tmp_path)
  for name in ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE'):
    monkeypatch.delenv(name, raising=False)
  config = 'from configs import tiny\n\n\ndef get_config(arg=""):\n'
  config += '  return tiny.get_config("micro")\n'
  files = {'experiments/train.py': '', 'mine.py': config, 'text/a.txt': 'a'}
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b.example']
  for words in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'one']):
    subprocess.run([*git, *words], check=True)
  return tmp_path


def faults(case, *train, action='up', flags=(), config='mine.py'):
  """Findings of a launch of mine.py, on eight devices without other words."""
  words = [w for w in CASES[case] if not w.startswith('--topology')]
  words[1:1] = [action]
  train = [f'--config={config}', '--config.mesh.fsdp=8', *train]
  backend, action, job, *_ = launch.parse([*words, *flags, '--', *train])
  return launch.preflight.findings(launch.BACKENDS[backend], action, job)


SIZES = {'tpu': 'v5e:2x4', 'gke': 'tpu7x:2x2x1', 'slurm': 'h100:8'}


@pytest.mark.parametrize('case', ['tpu', 'gke', 'slurm', 'vm'])
def test_a_launch_that_can_train_has_no_fault(case, clone):
  flags = [f'--topology={SIZES[case]}'] if case in SIZES else []
  assert faults(case, flags=flags) == []
  assert faults(case, '--config.data.source=text', flags=flags) == []


@pytest.mark.parametrize(
  'word, message',
  [
    ('--trak=wandb', "Unknown command line flag 'trak'. Did you mean: track"),
    ('--config.model.moe.topk=3', 'did you mean config.model.moe.top_k?'),
    ('--config.run.steps=x', 'config.run.steps=x: must be an int'),
    ('--config.run.steps=0', 'config.run.steps=0'),
    ('--config.rl.speculative=x', 'speculative=x: must be true or false'),
    ('--track=x', 'track'),
    ('seed=1', "'seed=1': not a flag; flags have --"),
  ],
)
def test_words_that_training_would_refuse_are_refused(word, message, clone):
  """By the flags of the program itself, none of which is defined here."""
  before = {*absl.flags.FLAGS}
  with pytest.raises(ConfigError, match=re.escape(message)) as refused:
    faults('slurm', word, flags=['--topology=h100:8'])
  assert str(refused.value).isprintable()
  assert {*absl.flags.FLAGS} == before
  values = absl.flags.FlagValues()
  train.define(values, [])
  assert {'config', 'workdir', 'replay', 'track'} <= {*values}


def test_a_config_that_is_not_sent_is_a_fault(clone, monkeypatch):
  flags = ['--topology=v5e:2x4']
  (clone / 'mine.py').rename(clone / 'other.py')
  with pytest.raises(ConfigError, match='no such file'):
    faults('tpu', flags=flags)
  (line,) = faults('tpu', config='other.py', flags=flags)
  assert line.startswith('--config=other.py: is not in the commit')
  gpus = ['--topology=h100:8']
  assert faults('slurm', config='other.py', flags=gpus) == []
  (clone / 'mine.py').write_text((clone / 'other.py').read_text() + '\n')
  (line,) = faults('tpu', flags=flags)
  assert line == 'mine.py: changed since the commit that is sent; commit first'
  (clone / 'imported_by_mine.py').write_text('')
  monkeypatch.syspath_prepend(clone)
  importlib.import_module('imported_by_mine')
  first, _ = faults('tpu', flags=flags)
  assert first.startswith('imported_by_mine.py: not in the commit that is sent')
  (line,) = faults('tpu', config=f'{clone}/mine.py', flags=flags)[:1]
  assert line.endswith('/mine.py: other machines have it as mine.py; say so')
  os.chdir(clone / 'text')
  (line,) = faults('tpu', config='../other.py', flags=flags)
  assert 'is not the root of a git clone' in line


def test_a_config_of_another_program_is_a_fault(clone):
  """The program itself would refuse it, on machines that cost money."""
  for case in ('tpu', 'slurm'):
    flags = [f'--topology={SIZES[case]}']
    (line,) = faults(case, '--config.rl.task=sort8', flags=flags)
    assert line == (
      "config.rl.task='sort8': is not for experiments.train; launch it with "
      '--program=rl'
    )
    (line,) = faults(case, flags=[*flags, '--program=rl'])
    assert line.endswith(
      'experiments.rl; launch it with --program=train or sft'
    )
  with pytest.raises(ConfigError, match='must be train, sft or rl'):
    faults('tpu', flags=['--program=serve'])


def test_reinforcement_and_fine_tuning_are_launched_with_their_flags(clone):
  (clone / 'rl.py').write_text(
    'from configs import r1_tiny\n\nget_config = r1_tiny.get_config\n'
  )
  git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b.example']
  (clone / 'text' / 'x.jsonl').write_text('')
  subprocess.run([*git, 'add', '.'], check=True)
  subprocess.run([*git, 'commit', '-qm', 'two'], check=True)
  rl = lambda case, *words, size='': faults(
    case, *words, config='rl.py',
    flags=['--program=rl', f'--topology={size or SIZES[case]}'],
  )  # fmt: skip
  assert rl('tpu', '--allow_code') == []
  assert rl('vm', size='h100:8') == []
  (line,) = rl('slurm')
  assert 'one process draws all answers, and h100:8 has 8 processes' in line
  (line,) = rl('tpu', size='v5e:2x4') + rl('tpu', size='v5p:2x2x2')
  assert 'has 2 processes' in line
  (line,) = rl('tpu', '--config.rl.minibatches=2')
  assert line.startswith('data.batch_size=512: the answers of an update')
  (line,) = rl('tpu', '--config.rl.task=gone.jsonl')
  assert line.startswith('config.rl.task=gone.jsonl')
  (line,) = rl('tpu', '--teacher=/elsewhere/run')
  assert '/elsewhere/run' in line
  tune = lambda file: faults(
    'tpu', '--data', file, config='rl.py:cold',
    flags=['--program=sft', '--topology=v5e:2x4'],
  )  # fmt: skip
  (line,) = tune('text/gone.jsonl')
  assert line.startswith('config.data.source=text/gone.jsonl')
  assert tune('text/x.jsonl') == []
  words = CASES['tpu'][0], 'up', *CASES['tpu'][1:]
  _, _, job, *_ = launch.parse([*words, '--program=rl', '--', '--allow_code'])
  text = as_typed(launch.commands('tpu', 'up', job))
  assert '-m experiments.rl --allow_code' in text
  assert ',viz,rl' in text


def test_adapters_are_launched_over_a_base_that_is_there(clone, monkeypatch):
  monkeypatch.setattr(launch.preflight, '_check_fit', lambda *_: None)
  adapted = '--config.model.lora.rank=2', '--config.optim.optimizer=adamw'
  base = lambda path: f'--config.run.base={path}'
  for case, fault in (('tpu', 'is not on those'), ('slurm', 'no file')):
    flags = [f'--topology={SIZES[case]}']
    (line,) = faults(case, *adapted, flags=flags)
    assert line.endswith('set run.base to a Hugging Face folder')
    (line,) = faults(case, *adapted, base('/absent'), flags=flags)
    assert line.startswith(f'config.run.base=/absent: {fault}')
    assert faults(case, *adapted, base('text'), flags=flags) == []
  fp8 = '--config.model.precision=fp8_block'
  (line,) = faults('vm', *adapted, fp8, base('text'))
  assert 'a frozen base is multiplied in model.dtype' in line


def test_a_mesh_of_another_size_is_a_fault_whose_cure_is_one(clone):
  (line,) = faults('tpu', flags=['--topology=v5e:2x2', '--slices=1'])
  assert 'product is 8, v5e:2x2 has 4 devices; ' in line
  cure = line.split('; ')[1].removesuffix(' fits').split()
  assert len(cure) >= 2
  reset = '--config.mesh.fsdp=1'
  assert faults('tpu', *cure, flags=['--topology=v5e:2x2']) == []
  assert (
    'has 8 devices' in faults('tpu', reset, flags=['--topology=v5e:2x4'])[0]
  )
  (line,) = faults('vm', flags=['--machine=n1-standard-8'])
  assert 'name them, such as --topology=h100:8' in line


def test_a_step_that_does_not_fit_is_a_fault(clone):
  large = '--config.model.vocab=150000000'
  (line,) = faults('tpu', large, flags=['--topology=v5e:2x4'])
  assert 'a device needs' in line and 'the smallest that fits is' in line


def test_a_path_of_this_machine_is_a_fault_on_others(clone, monkeypatch):
  monkeypatch.setattr(launch.preflight, '_check_fit', lambda *_: None)
  (clone / 'here.txt').write_text('a')
  ends = [
    {'id': i, 'content': text, 'special': True}
    for i, text in enumerate((vocabulary.BOS, vocabulary.EOS))
  ]
  words = {'model': {'vocab': {'a': 2}}, 'added_tokens': ends}
  (clone / 'words.json').write_text(json.dumps(words))
  source = lambda path: f'--config.data.source={path}'
  for case, folder in (('tpu', ''), ('gke', '/storage')):
    flags = [f'--topology={SIZES[case]}']
    for path in ('here.txt', f'{clone}/here.txt', '/data', f'{folder}/../x'):
      (line,) = faults(case, source(path), flags=flags)
      assert line.startswith(f'config.data.source={path}: is not on those')
      assert folder in line and 'and gs://' in line
    for there in ['gs://b/text', *[f'{folder}/text/*.txt'] * bool(folder)]:
      assert faults(case, source(there), flags=flags) == []
    (line,) = faults(case, '--config.data.tokenizer=words.json', flags=flags)
    assert line.startswith('config.data.tokenizer=words.json: is not on those')
    assert 'gs://' not in line
    (line,) = faults(case, '--profile=here.txt', flags=flags)
    assert line.startswith('profile=here.txt: is not on those')
    assert faults(case, '--init=gs://b/run', flags=flags) == []
  assert faults('vm', source('../x'))[0].endswith('the commit and gs://')
  assert faults('vm', source('../x'), action='start') == []
  flags = ['--topology=h100:8']
  assert faults('slurm', source(f'{clone}/here.txt'), flags=flags) == []
  (clone / 'shards').mkdir()
  (clone / 'shards' / 'corpus.json').write_text('{}')
  rows = ('stdlib', 1, 'lib'), (f'{clone}/shards', 1, 'shards')
  sets = (f'{clone}/here.tx?', 'set'), ('stdlib', 'all')
  train = [f'--config.data.sources={rows}', f'--config.data.validation={sets}']
  assert faults('slurm', *train, flags=flags) == []
  lines = faults('tpu', *train, flags=[f'--topology={SIZES["tpu"]}'])
  first, second = (line.partition('=')[0] for line in lines)
  assert first == 'config.data.sources shards'
  assert second == 'config.data.validation set'
  (line,) = faults('slurm', source('/absent/*.txt'), flags=flags)
  assert line.startswith("data.source='/absent/*.txt': ")


@pytest.mark.parametrize('dry', [['--dry-run'], []])
def test_faults_end_a_launch_before_its_first_command(
  dry, clone, monkeypatch, capsys
):
  stub(clone / 'bin' / 'gcloud')
  monkeypatch.setenv('PATH', f'{clone / "bin"}:{os.environ["PATH"]}')
  flags = ['vm', 'create', '--name=a', *WHERE, '--topology=h100:4', *dry]
  train = ['--', '--config=mine.py', '--config.data.source=/absent']
  monkeypatch.setattr(sys, 'argv', ['launch', *flags, *train])
  with pytest.raises(SystemExit) as ended:
    launch.main()
  message = capsys.readouterr()
  assert ended.value.code == 2 and not message.out and not calls(clone)
  first, second = message.err.splitlines()
  assert first.startswith('error: config.mesh: its product is 1, h100:4 has 4')
  assert second.startswith('error: config.data.source=/absent: is not')
  if dry:
    monkeypatch.setattr(sys, 'argv', ['launch', *flags, '--force', *train])
    launch.main()
    message = capsys.readouterr()
    assert message.err.count('WARNING: ') == 2
    assert message.out.startswith('gcloud compute instances create a ')


@pytest.mark.slow
@pytest.mark.parametrize('program', [launch, sweep])
def test_the_examples_of_a_docstring_can_train(program, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  text = program.__doc__.replace('\\\n', '')
  lines = re.findall(r'^  python -m experiments\.(.*)', text, re.M)
  assert lines
  for line in lines:
    words = shlex.split(line)
    force = ['--force'] if {'tpu', 'slurm'} & {*words} else []
    words[words.index('--') : words.index('--')] = force
    monkeypatch.setattr(sys, 'argv', [words[0], '--dry-run', *words[1:]])
    program.main()
    message = capsys.readouterr()
    assert message.out
    # This clone may have changes that are not committed, or no git.
    assert all('commit' in fault for fault in message.err.splitlines())


@pytest.mark.parametrize('case', ['tpu', 'slurm', 'vm'])
def test_a_start_without_an_environment_says_what_comes_first(case, tmp_path):
  """It ends with an error; in the background nobody would see one."""
  (line,) = remote(case, 'start')
  process = bash(line, tmp_path, srun='')
  assert process.returncode and 'install comes first' in process.stderr
  assert 'srun' not in [words[0] for words in calls(tmp_path)]


@pytest.mark.parametrize('case', ['tpu', 'tpu-slices', 'gke-bucket'])
def test_training_writes_to_the_bucket_and_nothing_mounts_it(case):
  """A mount loses the rows of a machine that is taken away."""
  run = f'{launch.parse(["tpu", "up", *CASES[case][1:]])[2].folder}'
  words = [
    w for action in ACTIONS for c in commands(case, action) for w in c.words
  ]
  assert run.startswith('gs://runs') and not re.search(
    'gcsfuse|mountpoint', ' '.join(words)
  )
  lines = [w for w in words if 'experiments.train' in w]
  assert lines and all(f' --workdir={run}' in line for line in lines)
  (extras,) = {
    x for w in words for x in re.findall(r'tpu,hf,data[a-z,0-9]*', w)
  }
  assert 'gcs' in extras.split(',')


@pytest.mark.parametrize('case', ['slurm', 'vm', 'gke'])
def test_a_text_in_a_bucket_has_its_library(case):
  """On machines whose runs are on disks, too."""
  text = lambda *train: as_typed(commands(case, 'install', (*TRAIN, *train)))
  assert 'hf,data,viz' in text() and 'gcs' not in text() + text('--x=gs:/b')
  assert 'viz,gcs' in text('--config.data.source=gs://b/text')
  assert 'viz,s3' in text("--config.data.sources=(('s3://b/t',1.0,'t'),)")


def test_slurm_gets_a_folder_for_its_log_and_processors(tmp_path, monkeypatch):
  """Slurm makes no folder, and gives a task one processor unless asked."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:{os.environ["PATH"]}')
  stub(tmp_path / 'bin' / 'scancel')
  stub(
    tmp_path / 'bin' / 'sbatch',
    'for w; do [ "${w%%=*}" != --output ] || echo > "${w#*=}" || exit 5; done',
  )
  words = ['slurm', 'start', '--name=a', '--topology=h100:4', '--cpus=12']
  words += [f'--storage={tmp_path}/my runs', '--', '--config=x.py']
  for action in 'start', 'resume':
    backend, _, job, *_ = launch.parse(words)
    lines = launch.commands(backend, action, job)
    with pytest.raises(ConfigError, match='before it come: install'):
      launch.execute(lines)
    train_stub('slurm', tmp_path)
    launch.execute(lines)
    *_, (_, *options) = calls(tmp_path)
    assert {'--cpus-per-task=12', '--dependency=singleton'} <= {*options}
    assert 'srun --cpus-per-task=12 .venv/bin/python -m ' in lines[-1].stdin
    assert (tmp_path / 'my runs' / 'a' / 'log.txt').exists()
    shutil.rmtree(tmp_path / 'my runs')
    shutil.rmtree(tmp_path / '.venv')
  with pytest.raises(ConfigError, match='--cpus=0: must be at least 1'):
    launch.parse(['slurm', 'start', '--name=a', '--cpus=0'])


WAITING = """n=$(cat n 2> /dev/null || echo 0); echo $((n + 1)) > n
case "$*" in *"echo ready"*) [ $n -gt 2 ] && echo ready || exit 255;; *)
  [ $n -gt 0 ] && echo "$STATE" || echo PENDING;; esac"""


@pytest.mark.parametrize('run', ['printed', 'executed'])
def test_a_machine_is_waited_for(run, tmp_path, monkeypatch):
  """Until it runs, then until it can be reached; not for one that is dead."""
  monkeypatch.chdir(tmp_path)
  stub(tmp_path / 'bin' / 'gcloud', WAITING)
  stub(tmp_path / 'bin' / 'sleep')
  monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:{os.environ["PATH"]}')
  monkeypatch.setattr(launch.time, 'sleep', lambda _: None)

  def code(state):
    monkeypatch.setenv('STATE', state)
    lines = commands('vm', 'create')[1:]
    if run == 'printed':
      line = ' && '.join(as_typed([c]) for c in lines)
      return bash(line, tmp_path).returncode
    try:
      launch.execute(lines)
    except ConfigError:
      return 1
    return 0

  assert code('RUNNING') == 0
  asked = [w for w in calls(tmp_path) if w[0] == 'gcloud']
  assert ['ssh' in w for w in asked] == [False, False, True, True]
  (tmp_path / 'n').unlink()
  assert code('TERMINATED') == 1
  assert not [w for w in calls(tmp_path) if 'ssh' in w]
  # A firewall: the machine is never reached.
  if run == 'executed':
    stub(tmp_path / 'bin' / 'gcloud', 'exit 255')
    with pytest.raises(ConfigError, match='gcloud ended with 255'):
      launch.execute(commands('vm', 'create')[2:])
    assert len(calls(tmp_path)) == 21


@pytest.mark.parametrize('case', CASES)
def test_each_action_is_a_start_or_says_what_comes_first(case):
  alone = {'create', 'delete'}
  alone |= {'tpu': {'resume'}, 'gke': {'install'}, 'slurm': {'install'}}.get(
    CASES[case][0], set()
  )
  for action in ACTIONS:
    lines = commands(case, action)
    text = as_typed(lines)
    assert text.startswith('# after ') == (action not in alone), action
    (after,) = {c.after for c in lines}
    assert text.count('# after') <= 1
    for earlier in re.findall(r'create|install|start', after):
      assert ACTIONS.index(earlier) < ACTIONS.index(action)


def test_a_missing_program_is_named():
  with pytest.raises(ConfigError, match='no-such-program: is not installed'):
    launch.execute([command('no-such-program')])


def write() -> None:
  """Writes the golden files."""
  for case in CASES:
    (GOLDEN / f'{case}.txt').write_text(dry_run(case))


if __name__ == '__main__':
  write()
