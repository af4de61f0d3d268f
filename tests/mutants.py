"""Do the tests see a wrong program? `make mutants` changes one line at a time.

A mutant is the tree with one mutation (`mutations.py`) in an arithmetic file.
It is killed if a test fails, and survives if all tests pass that reach the
line. A survivor is a missing test, or an equivalent program: mutants.md, beside
this file, has the last run's figures and the reason of each survivor.

The run has three parts. First the unchanged tree: each test's CPU time, and the
lines that it reaches (coverage), which choose the tests of a mutant: the
cheapest, up to --budget seconds. Then the mutants, a sample by --seed from all
files. Last the control: each test that killed must pass on the unchanged tree.
A mutant costs a fork of a process that has imported jax and pytest and never
started a backend, so most of its time is the tests' own.

Why no library: mutmut 3 leaves out decorated functions, among them those with a
hand-written gradient, and methods of dataclasses; Cosmic Ray starts Python anew
for each mutant, with the same tests for all files.

  python tests/mutants.py              # a sample; a stopped run continues
  python tests/mutants.py --again --budget 500       # survivors alone
  python tests/mutants.py --again --slow --tests tests/test_sharding.py
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import mutations

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = (
  *('model/*.py', 'fp8/*.py', 'decode/*.py', 'cost.py'),
  *('train/losses.py', 'train/optim.py', 'train/step.py', 'train/state.py'),
  *('hf/names.py', 'hf/fp8_blocks.py'),
)
# The arithmetic among the programs' files: of texts, and reinforcement.
PROGRAMS = 'experiments'
ARITHMETIC = (
  *('data/documents.py', 'data/holdout.py', 'data/mixture.py'),
  *('rl/advantages.py', 'rl/episodes.py', 'rl/objective.py'),
)
# Tests of numbers; those of programs start processes, which no line shows.
TESTS = (
  *('tests/model', 'tests/fp8', 'tests/train', 'tests/decode', 'tests/data'),
  *('tests/hf', 'tests/kernels', 'tests/test_cost.py', 'tests/test_config.py'),
  *('tests/test_sharding.py', 'tests/programs/test_scheduler.py', 'tests/rl'),
)
# Imported once, before the forks. None of them starts a backend of jax.
WARM = (
  *('jax', 'jax.experimental.pallas', 'jax.experimental.pallas.tpu'),
  *('jax.experimental.pallas.triton', 'flax.linen', 'optax', 'chex'),
  *('orbax.checkpoint', 'hypothesis', 'jaxtyping', 'beartype', 'pytest'),
  *('coverage', 'ml_collections', 'rich.console', '_pytest.assertion.rewrite'),
)
PAGE = ROOT / 'tests' / 'mutants.md'
SPARE_SECONDS = 30  # of CPU: imports, and fixtures that another test shared
BROKEN = 99  # exit code of a fork that could not run pytest
MEMORY = 12 << 30  # a wrong size must not take the machine's


@dataclasses.dataclass
class Test:
  """One test of the unchanged tree: CPU seconds, and the lines it reaches."""

  name: str
  seconds: float
  lines: dict[str, list[int]]


def main(argv: list[str] | None = None) -> int:
  args = _parse(argv)
  os.environ.update(JAX_PLATFORMS='cpu', JAX_DISABLE_MOST_OPTIMIZATIONS='1')
  for module in WARM:
    importlib.import_module(module)
  trees = [_copy(args.work / f'tree{i}') for i in range(args.workers)]
  named = [Test(name, 60.0, {}) for name in args.tests]
  tests = named or _baseline(trees, args)
  record, sample = args.work / 'results.jsonl', _stored_sample(args)
  rows = record.read_text().splitlines() if record.exists() else []
  results = {row['key']: row for row in map(json.loads, rows)}
  missing = [m for m in sample if m.key not in results]
  if args.again:
    missing = [m for m in sample if results.get(m.key, {}).get('test') == '']
    missing = [m for m in missing if args.files in m.file]
  jobs = [functools.partial(_try, m, tests, args) for m in missing]
  for count, result in enumerate(_parallel(jobs, trees), 1):
    results[result['key']] = result
    with open(record, 'a', encoding='utf-8') as f:
      f.write(json.dumps(result) + '\n')
    word = 'killed' if result['test'] else 'SURVIVED'
    line = f'{count}/{len(jobs)} {word} {result["seconds"]:.0f} s'
    print(f'{line} {result["line"]} | {result["key"]}', flush=True)
  rows = [results[m.key] for m in sample if m.key in results]
  _control(rows, trees, args)
  return _report(rows)


def _parse(argv):
  parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
  cores = os.cpu_count()
  parser.add_argument('--mutants', type=int, default=240, help='sample size')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--workers', type=int, default=cores, help='forks at once'
  )
  parser.add_argument(
    '--budget', type=float, default=40, help="CPU seconds of a mutant's tests"
  )
  parser.add_argument(
    '--files', default='', help='only sources with this in their path'
  )
  parser.add_argument('--again', action='store_true', help='survivors alone')
  parser.add_argument(
    '--tests', nargs='*', default=[], help='these, not those of the lines'
  )
  parser.add_argument('--slow', action='store_true', help='slow tests, too')
  parser.add_argument(
    '--work', type=pathlib.Path, default=ROOT / 'build' / 'mutants'
  )
  args = parser.parse_args(argv)
  args.work = args.work.absolute()
  return args


def _copy(tree: pathlib.Path) -> pathlib.Path:
  """Makes `tree` a copy of the tracked and the untracked, unignored files."""
  command = ['git', 'ls-files', '-co', '--exclude-standard']
  files = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
  for file in files:
    source, target = ROOT / file, tree / file
    if source.is_file():
      target.parent.mkdir(parents=True, exist_ok=True)
      if not target.exists() or source.read_bytes() != target.read_bytes():
        shutil.copy2(source, target)
        _forget(target)
  for path in tree.rglob('*.py'):  # of a run before this one
    if str(path.relative_to(tree)) not in files:
      path.unlink()
  return tree


def _forget(path):
  """Removes the bytecode of a module: two versions may share size and time."""
  for code in (path.parent / '__pycache__').glob(f'{path.stem}.*'):
    code.unlink()


def _stored_sample(args) -> list[mutations.Mutation]:
  """Returns the run's sample, drawn by its first start.

  A later start finds it again in a tree whose tests, or other lines, differ.
  """
  groups = []
  sources = [p for s in SOURCES for p in (ROOT / 'mla_moe').glob(s)]
  sources += [ROOT / PROGRAMS / name for name in ARITHMETIC]
  for path in sorted(sources):
    name = str(path.relative_to(ROOT))
    by_key = {m.key: m for m in mutations.mutations(name, path.read_text())}
    groups.append(list(by_key.values()))
  store = args.work / 'sample.json'
  if not store.exists():
    store.write_text(json.dumps([m.key for m in _sample(groups, args)]))
  mutants = {m.key: m for group in groups for m in group}
  keys = json.loads(store.read_text())
  for key in keys:
    if key not in mutants:
      print(f'no longer in the tree: {key}')
  return [mutants[key] for key in keys if key in mutants]


def _sample(groups, args) -> list[mutations.Mutation]:
  """Returns mutations of each file's group, their number by its size."""
  total = sum(map(len, groups))
  draw, sample = random.Random(args.seed), []
  for group in groups:
    count = round(args.mutants * len(group) / total + 0.4)
    sample += draw.sample(group, min(count, len(group)))
  draw.shuffle(sample)  # a run that stops has seen all files
  return [m for m in sample if args.files in m.file]


def _parallel(jobs: list[Callable], trees: list) -> Iterator[dict]:
  """Yields the results of the jobs, each called with a tree of its own."""
  jobs, running, idle = jobs[::-1], {}, list(trees)
  try:
    yield from _turns(jobs, running, idle)
  finally:
    for child in running:
      os.killpg(child, signal.SIGKILL)


def _turns(jobs, running, idle):
  while jobs or running:
    while jobs and idle:
      tree = idle.pop()
      job = jobs.pop()(tree)
      running[next(job)] = job, tree, time.monotonic()
    pid, status, usage = os.wait4(-1, os.WNOHANG)
    if pid in running:
      job, tree, _ = running.pop(pid)
      idle.append(tree)
      yield job.send((status, usage.ru_utime + usage.ru_stime))
    elif not pid:
      for child, (_, _, start) in running.items():
        if time.monotonic() - start > 1800:  # a deadlock uses no CPU
          os.killpg(child, signal.SIGKILL)
      time.sleep(0.05)


def _fork(tree, tests, report, limit, slow, plugin):
  """Returns the pid of a fork that runs `tests` on `tree` and reports.

  The package is imported there, all of it: checks of annotations that were made
  before would look for the classes of another import.
  """
  pid = os.fork()
  if pid:
    return pid
  code = BROKEN
  try:
    os.setsid()
    soft = int(limit)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, soft + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.open(f'{report}.log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(tree)
    here = str(pathlib.Path(__file__).parent)
    sys.path[:] = [str(tree), *(p for p in sys.path if p not in (here, ''))]
    os.environ['PYTHONPATH'] = str(tree)
    import pytest

    plugin = plugin()
    options = ['-q', '-p', 'no:xdist', *plugin.options]
    options += ['-W', 'ignore::pytest.PytestAssertRewriteWarning']
    options += [] if slow else ['-m', 'not slow']
    code = int(pytest.main([*options, *tests], plugins=[plugin]))
    pathlib.Path(report).write_text(
      json.dumps(plugin.result()), encoding='utf-8'
    )
    sys.stdout.flush()
  except BaseException:
    traceback.print_exc()
  finally:
    os._exit(code)


class _Reached:
  """A plugin that measures tests: CPU seconds, and lines by coverage."""

  options = ()

  def __init__(self, tree):
    import coverage

    self.tree = tree
    self.coverage = coverage.Coverage(
      data_file=None,
      source=[str(tree / 'mla_moe'), str(tree / PROGRAMS)],
      config_file=False,
    )
    self.coverage.start()
    self.seconds = {}
    self.failed = set()

  def pytest_runtest_logreport(self, report):
    if report.failed:
      self.failed.add(report.nodeid)

  def pytest_runtest_logstart(self, nodeid):
    self.coverage.switch_context(nodeid)
    self.seconds[nodeid] = -time.process_time()

  def pytest_runtest_logfinish(self, nodeid):
    self.seconds[nodeid] += time.process_time()
    self.coverage.switch_context('')

  def result(self):
    self.coverage.stop()
    data = self.coverage.get_data()
    lines = {name: {} for name in self.seconds}
    for file in data.measured_files():
      path = str(pathlib.Path(file).relative_to(self.tree))
      for line, contexts in data.contexts_by_lineno(file).items():
        for name in filter(None, contexts):
          lines[name].setdefault(path, []).append(line)
    return [
      dict(name=name, seconds=seconds, lines=lines[name])
      for name, seconds in self.seconds.items()
      if name not in self.failed  # by the tracer's or the machine's slowness
    ]


class _Failure:
  """A plugin that stops at the first failure and has its name and message."""

  options = ('-x',)

  def __init__(self):
    self.failure = {'test': '', 'error': ''}

  def pytest_runtest_logreport(self, report):
    if report.failed:
      self._set(report)

  def pytest_collectreport(self, report):
    if report.failed:
      self._set(report)

  def _set(self, report):
    if self.failure['test']:
      return  # what follows a failure is its consequence
    crash = getattr(report.longrepr, 'reprcrash', None)
    message = crash.message if crash else str(report.longrepr)[-200:]
    line = next(iter(message.splitlines()), '')[:200]
    self.failure = {'test': report.nodeid or 'collection', 'error': line}

  def result(self):
    return self.failure


def _baseline(trees, args) -> list[Test]:
  """Returns the tests of the unchanged tree; files that changed run again."""
  folder = args.work / ('baseline-slow' if args.slow else 'baseline')
  folder.mkdir(parents=True, exist_ok=True)
  folders = (ROOT / 'mla_moe', ROOT / PROGRAMS)
  sources = sorted(p for folder in folders for p in folder.rglob('*.py'))
  code = b''.join(p.read_bytes() for p in sources)
  files = []
  for name in TESTS:
    path = ROOT / name
    files += sorted(path.glob('test_*.py')) if path.is_dir() else [path]
  reports = {}
  for file in files:
    digest = hashlib.sha256(code + file.read_bytes()).hexdigest()[:16]
    reports[file] = folder / f'{file.stem}-{digest}.json'

  def measure(file):
    def job(tree):
      plugin = functools.partial(_Reached, tree)
      name = str(file.relative_to(ROOT))
      pid = _fork(tree, [name], reports[file], 1e5, args.slow, plugin)
      status, seconds = yield pid
      code = os.waitstatus_to_exitcode(status)
      if not reports[file].exists():
        raise SystemExit(f'{name} ends on the unchanged tree: {code}')
      note = ', failing tests left out' if code == 1 else ''
      print(f'unchanged: {name} {seconds:.0f} s{note}', flush=True)
      yield {}

    return job

  missing = [measure(f) for f, report in reports.items() if not report.exists()]
  for _ in _parallel(missing, trees):
    pass
  tests = [
    Test(**t) for r in reports.values() for t in json.loads(r.read_text())
  ]
  return tests


def choose(
  mutation: mutations.Mutation, tests: list[Test], budget: float
) -> list[Test]:
  """Returns the cheapest tests that reach a mutation, grouped by their files.

  The lines of a module outside of functions run when it is imported, for all
  the tests that reach any line of it.
  """
  first, last = mutation.lines
  reached = []
  for test in tests:
    lines = test.lines.get(mutation.file, ())
    inside = any(first <= line <= last for line in lines)
    if inside or (lines and not mutation.function):
      reached.append(test)
  reached.sort(key=lambda test: test.seconds)
  total, chosen = 0.0, []
  for test in reached:
    total += test.seconds
    if total <= budget or not chosen:
      chosen.append(test)
  groups = {}
  for test in chosen:
    groups.setdefault(test.name.split('::')[0], []).append(test)
  cost = lambda group: sum(test.seconds for test in group)
  return [test for group in sorted(groups.values(), key=cost) for test in group]


def _try(mutation, tests, args, tree):
  """A job: runs the tests of a mutant, and yields its result at the end."""
  chosen = tests if args.tests else choose(mutation, tests, args.budget)
  path, report = tree / mutation.file, tree / 'mutant.json'
  original = path.read_text()
  report.unlink(missing_ok=True)
  _forget(path)
  path.write_text(mutation.apply(original))
  limit = SPARE_SECONDS + 4 * sum(test.seconds for test in chosen)
  names = [test.name for test in chosen] or ['tests/checking.py']
  status, seconds = yield _fork(tree, names, report, limit, args.slow, _Failure)
  path.write_text(original)
  _forget(path)
  code = os.waitstatus_to_exitcode(status)
  if code == BROKEN:
    raise SystemExit(pathlib.Path(f'{report}.log').read_text(encoding='utf-8'))
  result = {'test': '', 'error': ''}
  if chosen and code:
    result = {'test': 'process', 'error': f'exit code {code}'}
    if report.exists() and json.loads(report.read_text())['test']:
      result = json.loads(report.read_text())
  yield result | {
    'key': mutation.key,
    'line': mutation.line,
    'seconds': seconds,
    'tests': len(chosen),
    'slow': args.slow,
  }


def _control(results, trees, args):
  """Runs each test that killed on the unchanged tree: all must pass."""
  store = args.work / 'control.json'
  passing = set(json.loads(store.read_text()) if store.exists() else ())
  names = sorted({r['test'] for r in results if '::' in r['test']} - passing)
  groups = {}
  for name in names:
    groups.setdefault(name.split('::')[0], []).append(name)

  def run(names):
    def job(tree):
      report = tree / 'control.json'
      status, _ = yield _fork(tree, names, report, 1e5, True, _Failure)
      if status:
        raise SystemExit(f'without a change: {report.read_text()}')
      yield {}

    return job

  for _ in _parallel([run(names) for names in groups.values()], trees):
    pass
  store.write_text(json.dumps(sorted(passing | set(names))))


def _report(results) -> int:
  """Prints the table and the survivors; returns 1 if over a tenth lives."""
  page = PAGE.read_text() if PAGE.exists() else ''
  files = {}
  for result in results:
    files.setdefault(result['key'].split(' | ')[0], []).append(result)
  print('\n| file | mutants | survivors |\n| --- | ---: | ---: |')
  for file, rows in sorted(files.items()):
    print(f'| {file} | {len(rows)} | {sum(not r["test"] for r in rows)} |')
  survivors = [r for r in results if not r['test']]
  seconds = sum(r['seconds'] for r in results)
  print(f'| all | {len(results)} | {len(survivors)} |\n\n{seconds:.0f} CPU s')
  for result in survivors:
    state = 'explained' if result['key'] in page else 'NOT EXPLAINED'
    reached = f'{result["tests"]} tests'
    print(f'{state} ({reached}), line {result["line"]}: {result["key"]}')
  return int(len(survivors) > len(results) / 10)


if __name__ == '__main__':
  sys.exit(main())
