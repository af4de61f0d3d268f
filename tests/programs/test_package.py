"""The package as it is installed: one name, all programs, all configs."""

import ast
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import types
import zipfile

import pytest
import skips
import syntax

from experiments import __main__ as programs
from experiments import cli, commands
from mla_moe.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = {path.stem for path in (ROOT / 'configs').glob('[a-z]*.py')}


def test_a_program_is_found_and_typed_by_its_packages_name(monkeypatch):
  line = 'python -m experiments.train --config=configs/tiny.py:smoke'
  assert commands.typed(line) == line
  assert commands.program('train')[1:] == ['-m', 'experiments.train']
  monkeypatch.setattr(commands, '__package__', 'mla_moe.experiments')
  assert commands.typed(line) == 'mla-moe train --config=tiny:smoke'
  assert commands.program('plan')[1:] == ['-m', 'mla_moe.experiments.plan']


def test_programs_start_each_other_by_the_name_of_their_own_package():
  """A name of the clone's would not be there where the package is installed."""
  fixed = set()
  for path in sorted((ROOT / 'experiments').rglob('*.py')):
    for node in ast.walk(syntax.tree(path)):
      value = node.value if isinstance(node, ast.Constant) else ''
      if isinstance(value, str) and value.startswith('experiments.'):
        fixed.add(path.relative_to(ROOT / 'experiments').as_posix())
  assert fixed == {'launch/job.py'}  # for another machine, in a clone there


def test_mla_moe_runs_the_program_that_it_names(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['mla-moe', 'report'])
  monkeypatch.delitem(sys.modules, 'experiments.report', raising=False)
  with pytest.raises(SystemExit) as ended:
    programs.main()
  assert ended.value.code == 2
  assert 'experiments.report DIR' in capsys.readouterr().err
  monkeypatch.setattr(sys, 'argv', ['mla-moe', 'tarin'])
  with pytest.raises(SystemExit) as ended:
    programs.main()
  assert ended.value.code == 2
  message = "error: 'tarin': is no program; did you mean train?\n"
  assert capsys.readouterr().err == message


def test_the_help_has_a_line_for_each_program(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['mla-moe', '--help'])
  programs.main()
  shown = capsys.readouterr().out.splitlines()
  for name, line in programs.programs().items():
    assert f'  {name:11} {line}' in shown
  assert len(programs.programs()) >= 14 and 'train' in programs.programs()


def test_a_config_is_found_by_its_name_or_its_file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pathlib.Path('mine.py').write_text('', encoding='utf-8')
  for name in CONFIGS:
    assert cli.file_of(name) == ROOT / 'configs' / f'{name}.py'
  assert cli.file_of('mine.py') == pathlib.Path('mine.py')
  tiny = ROOT / 'configs' / 'tiny.py'
  assert cli.with_files(['p', '--config', 'tiny:smoke', '--config.x=tiny']) == (
    ['p', '--config', f'{tiny}:smoke', '--config.x=tiny']
  )
  words = ['p', '--workdir=tiny', f'--config={tmp_path}/mine.py:a,b']
  assert cli.with_files(words) == words
  assert cli.with_files(['p', '-config=tiny']) == ['p', f'-config={tiny}']
  with pytest.raises(ConfigError, match='config=tine: is no file') as refused:
    cli.file_of('tine')
  assert all(name in str(refused.value) for name in CONFIGS)
  with pytest.raises(ConfigError, match='did you mean tiny'):
    cli.file_of('configs/tiny.py')  # here is no such folder


def metadata(monkeypatch):
  """The arguments of setup.py's `setup`."""
  setuptools = pytest.importorskip('setuptools')
  calls = []
  monkeypatch.setattr(
    setuptools, 'setup', lambda **values: calls.append(values)
  )
  monkeypatch.chdir(ROOT)
  spec = importlib.util.spec_from_file_location('its_setup', ROOT / 'setup.py')
  spec.loader.exec_module(importlib.util.module_from_spec(spec))
  return calls[0]


@pytest.mark.filterwarnings('ignore')  # old setuptools' own
def test_every_file_of_the_programs_is_in_the_package(monkeypatch):
  values = metadata(monkeypatch)
  packages = set(values['packages'])
  assert {name.split('.')[0] for name in packages} == {'mla_moe'}
  for folder in ('mla_moe', 'experiments', 'configs'):
    for path in sorted((ROOT / folder).rglob('*')):
      name = '.'.join(path.parent.relative_to(ROOT).parts)
      name = name if folder == 'mla_moe' else f'mla_moe.{name}'
      if path.suffix == '.py':
        assert name in packages, path
      elif path.is_file() and path.suffix not in ('.pyc', '.md'):
        assert path.name in values['package_data'][name], path


@pytest.mark.filterwarnings('ignore')  # old setuptools' own
def test_the_table_of_extras_is_setups(monkeypatch):
  extras = metadata(monkeypatch)['extras_require']
  page = (ROOT / 'docs' / 'install.md').read_text(encoding='utf-8')
  rows = dict(re.findall(r'^\| `(\w+)` \| (.*?) \|', page, re.M))
  assert list(rows) == list(extras)
  bare = lambda name: re.match(r'[\w.-]+(\[\w+\])?', name)[0]
  for name in set(extras) - {'test', 'ci'}:
    assert rows[name].split(', ') == [bare(item) for item in extras[name]], name
  absent = re.findall(r'`(\w+)`', rows['test'])
  for name, items in extras.items():
    inside = set(items) <= set(extras['test'])
    assert inside != (name in absent) or name == 'ci', name
  for path in [
    *ROOT.glob('mla_moe/**/*.py'),
    *ROOT.glob('experiments/**/*.py'),
  ]:
    named = re.findall(r'mla_moe\[(\w+)\]', path.read_text(encoding='utf-8'))
    assert set(named) <= set(extras), path
  own = set(map(bare, extras['ci'])) - set(map(bare, extras['test']))
  parts = re.findall(r'`(\w+)`', rows['ci'])
  named = set(rows['ci'].split(', ')[len(parts) :])
  for part in parts[1:]:
    named |= set(map(bare, extras[part]))
  assert own == named


def is_buildable():
  """Whether setuptools can make a wheel without a network."""
  try:
    version = importlib.metadata.version('setuptools')
  except importlib.metadata.PackageNotFoundError:
    return False
  return tuple(map(int, version.split('.')[:2])) >= (70, 1)


@pytest.mark.slow
@pytest.mark.skipif(not is_buildable(), reason='setuptools>=70.1, of [test]')
def test_the_wheel_works_in_an_empty_folder(tmp_path):
  """Programs by name, one started by another; a config that imports ours."""
  listed = ['git', 'ls-files', '-z', 'mla_moe', 'experiments', 'configs']
  listed += ['setup.py', 'pyproject.toml', 'LICENSE']
  out = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
  for name in filter(None, out.decode().split('\0')):
    target = tmp_path / 'source' / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes((ROOT / name).read_bytes())
  pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
  build = [*pip, 'wheel', '--no-build-isolation', '--no-deps', '--no-index']
  subprocess.run(
    [*build, '-w', tmp_path, tmp_path / 'source'], check=True, timeout=120
  )
  (wheel,) = tmp_path.glob('*.whl')
  names = zipfile.ZipFile(wheel).namelist()
  tops = {name.split('/')[0] for name in names}
  assert tops == {
    'mla_moe',
    '-'.join([*wheel.name.split('-')[:2]]) + '.dist-info',
  }
  subprocess.run(
    [*pip, 'install', '--no-deps', '--no-index', '-t', tmp_path / 'lib', wheel],
    check=True,
  )
  empty = tmp_path / 'empty'
  empty.mkdir()
  (empty / 'mine.py').write_text(
    'from configs import tiny\n\n\ndef get_config(arg=""):\n'
    '  config = tiny.get_config("micro")\n  config.run.steps = 2\n'
    '  return config\n',
    encoding='utf-8',
  )
  environment = {
    **os.environ,
    'PYTHONPATH': str(tmp_path / 'lib'),
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  }
  script = [sys.executable, str(tmp_path / 'lib' / 'bin' / 'mla-moe')]
  module = [sys.executable, '-m', 'mla_moe']
  texts = f'--config.data.source={ROOT}/mla_moe/model/*.py'
  for start, words, shown in (
    (script, ['--help'], 'train'),
    (module, ['doctor', '--help'], 'mla-moe doctor'),
    (script, ['plan', '--config=tiny', '--topology=v5e-1'], 'To train it so'),
    (
      module,
      ['sweep', '--vary=run.seed=3', '--workdir=b', '--']
      + ['--config=mine.py', texts],
      'main_loss',
    ),
    (script, ['checkpoint', 'verify', 'b/seed=3'], 'whole'),
  ):
    done = subprocess.run(
      [*start, *words],
      cwd=empty,
      env=environment,
      capture_output=True,
      text=True,
      timeout=250,
    )
    assert done.returncode == 0, f'{words}\n{done.stderr[-3000:]}'
    assert shown in done.stdout, f'{words}\n{done.stdout[-3000:]}'
  assert (empty / 'b' / 'seed=3' / 'checkpoints' / '2').is_dir()


_WITHOUT = """
import jax, runpy, sys
sys.modules |= {'fcntl': None, 'resource': None}  # as on Windows
for words in (['train'], ['plan'], ['serve'], ['sweep', '--vary=run.seed=1'],
  ['checkpoint', 'ls', '.'], ['report', '.'], ['soak'], ['chat']):
  sys.argv = words
  try:
    runpy.run_module(f'experiments.{words[0]}', run_name='__main__')
  except SystemExit as ended:
    print(words[0], ended.code)
"""


def test_a_system_without_locks_or_limits_is_refused_in_a_line(monkeypatch):
  command = [sys.executable, '-c', _WITHOUT]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  codes = done.stdout.splitlines()
  assert len(codes) == 8 and all(line.endswith(' 2') for line in codes), done
  lines = done.stderr.splitlines()
  assert len(lines) == 8, done.stderr
  assert all('no fcntl here' in line and 'WSL2' in line for line in lines)
  monkeypatch.setitem(sys.modules, 'resource', None)
  with pytest.raises(ConfigError, match='no resource here'):
    cli._check_system()


def test_a_skip_that_ci_does_not_expect_fails():
  report = lambda reason, **more: types.SimpleNamespace(
    skipped=True, outcome='skipped', longrepr=('file', 1, reason), **more
  )
  verdict = lambda *args, **more: skips.check(report(*args, **more), 'no torch')
  failed = verdict('Skipped: could not import libtpu')
  assert failed.outcome == 'failed' and 'libtpu' in failed.longrepr
  assert verdict('Skipped: no torch').outcome == 'skipped'
  assert verdict('', wasxfail='known').outcome == 'skipped'
  ran = types.SimpleNamespace(skipped=False, outcome='passed', longrepr=None)
  assert skips.check(ran, 'no torch').outcome == 'passed'
