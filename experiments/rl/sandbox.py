"""Runs programs that a model wrote, to see whether they pass tests.

A program runs in a process of its own: without an environment, in an empty
folder, with limits of time, memory, files and processes (`confine`), as nobody
where the trainer is root, and in namespaces without a network and without other
processes where the system permits them. Everything in it is killed at the
deadline. `Sandbox` tries this on a program of ours first, and its `about` is
the result in a line.

This keeps a careless or a greedy program from harming a run. It is *no security
boundary*: the program may read all files that its user may read, leave small
files in /tmp, and meets the whole kernel. Against an attack, put the trainer
into a machine of its own.

The value that is expected never enters the process, so that there is nothing to
find there: an answer that overrides ==, leaves early or reads the tests gains
nothing. A test is

  {"input": "3 4\\n", "output": "7\\n"}    text on stdin, text on stdout
  {"call": "add(3, 4)", "returns": 7}     an expression, and its value as JSON
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

from mla_moe.config import ConfigError

_CONFINE = pathlib.Path(__file__).with_name('confine.py')
MEMORY = 2**28  # bytes
_FILE = 2**20  # bytes of a file, stdout too
_OUTPUT = 2**16  # bytes of stdout that are read
_SOURCE = 2**16  # characters of a program
_BLOCK = re.compile(r'```(?:python|py)?[ \t]*\n(.*?)```', re.DOTALL)
# An answer's line of this kind would have to be the file's first.
_FUTURE = re.compile(r'^from __future__ import [^\n]*$', re.MULTILINE)
_PROBE = """
import json, os, socket
def refused(attempt):
  try:
    attempt()
  except OSError:
    return True
  return False
def leave():
  if os.fork() == 0:
    os._exit(0)
# Connecting a datagram asks for a route, and sends nothing.
route = lambda: socket.socket(type=socket.SOCK_DGRAM).connect(('192.0.2.1', 9))
print(json.dumps({'fork': refused(leave), 'network': refused(route),
                  'alone': os.getpid() == 1, 'nobody': os.getuid() == 65534}))
"""


def checked(tests: object) -> tuple[dict, ...]:
  """Returns the tests of a question.

  Raises:
    ConfigError: they are not of the two kinds above.
  """
  if not isinstance(tests, list) or not tests:
    raise ConfigError('"tests" must be a list that is not empty')
  for test in tests:
    keys = set(test) if isinstance(test, dict) else set()
    kinds = {'input': str, 'output': str} if 'input' in keys else {'call': str}
    if keys not in ({'input', 'output'}, {'call', 'returns'}) or not all(
      isinstance(test[key], kind) for key, kind in kinds.items()
    ):
      raise ConfigError(
        'a test must be {"input": TEXT, "output": TEXT} or {"call": '
        'EXPRESSION, "returns": VALUE}'
      )
  return tuple(tests)


def program(text: str) -> str | None:
  """Returns the last fenced block of code in a text, None without one."""
  blocks = _BLOCK.findall(text)
  return blocks[-1] if blocks else None


class Sandbox:
  """Runs programs, each for at most `deadline` seconds.

  `about` says in a line what the programs cannot do here.

  Raises:
    ConfigError: a program could harm the run here.
  """

  def __init__(self, deadline: float):
    self.deadline = deadline
    self._limits = _CONFINE.read_text(encoding='utf-8')
    self._wrapper: list[str] = []
    self._removals: list[subprocess.Popen] = []
    seen = None
    for wrapper in _wrappers():
      self._wrapper = wrapper
      output = self.output(_PROBE, '', 10 * deadline)
      with contextlib.suppress(ValueError, TypeError):
        seen = json.loads(output)
        break
    if seen is None:
      raise ConfigError(
        '--allow_code: a first program of ours does not run in the sandbox; '
        'leave the reward "code" out on this machine'
      )
    if not seen['fork'] or not (seen['alone'] or os.geteuid() == 0):
      raise ConfigError(
        '--allow_code: this system permits no process namespace, so that an '
        "answer could end the run; let the system's owner permit `unshare "
        '--user --pid`, or run as root in a container'
      )
    closed = 'no network' if seen['network'] else 'the NETWORK IS OPEN'
    user = 'as nobody' if os.geteuid() == 0 else 'as this user'
    self.about = (
      f'code runs {user}, {closed}, at most {deadline:g} s and '
      f'{MEMORY >> 20} MiB; it may read files; no security boundary'
    )

  def passes(self, code: str, tests: Sequence[Mapping]) -> bool:
    """Returns whether a program passes all tests within the deadline."""
    end = time.monotonic() + self.deadline
    for test in tests:
      left = end - time.monotonic()
      if left <= 0 or not self._passes(code, test, left):
        return False
    return True

  def _passes(self, code: str, test: Mapping, seconds: float) -> bool:
    if 'input' in test:
      output = self.output(code, test['input'], seconds)
      return output is not None and _words(output) == _words(test['output'])
    show = f'import json as _json\nprint()\nprint(_json.dumps({test["call"]}))'
    call = f'{code}\n{show}\n'
    output = self.output(call, '', seconds)
    try:
      value = json.loads((output or '').rstrip().rpartition('\n')[2])
    except (ValueError, RecursionError):
      return False
    return type(value) is type(test['returns']) and value == test['returns']

  def output(self, code: str, text: str, seconds: float) -> str | None:
    """Returns the first 64 KiB that a program prints; None where it fails.

    `text` is its input. It fails where it ends with an error or too late.
    """
    if len(code) > _SOURCE or '\0' in code:
      return None
    limits = f'confine({math.ceil(seconds)}, {MEMORY}, {_FILE})'
    source = f'{self._limits}\n{limits}\ndel confine\n{_FUTURE.sub("", code)}'
    with self._folder() as folder, tempfile.TemporaryFile() as out:
      (folder / 'answer.py').write_text(
        source, encoding='utf-8', errors='replace'
      )
      (folder / 'input').write_text(text, encoding='utf-8', errors='replace')
      with (folder / 'input').open('rb') as file:
        process = subprocess.Popen(
          [*self._wrapper, sys.executable, '-ISB', str(folder / 'answer.py')],
          stdin=file,
          stdout=out,
          stderr=subprocess.DEVNULL,
          cwd=folder,
          env={},
          start_new_session=True,
        )
      code_of_exit = _wait(process, seconds)
      out.seek(0)
      printed = out.read(_OUTPUT).decode('utf-8', 'replace')
    return printed if code_of_exit == 0 else None

  @contextlib.contextmanager
  def _folder(self) -> Iterator[pathlib.Path]:
    """Makes an empty folder for a program, and removes all that it left there.

    rm goes into folders that are nested deeper than Python recurses. A hundred
    thousand of them take it a minute, for which nobody waits.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix='answer-'))
    try:
      if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
      yield folder
    finally:
      removal = subprocess.Popen(
        ['rm', '-rf', '--', str(folder)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
      )
      self._removals.append(removal)
      with contextlib.suppress(subprocess.TimeoutExpired):
        removal.wait(0.5)
      self._removals = [r for r in self._removals if r.poll() is None]


def _wrappers() -> list[list[str]]:
  """Returns commands that start a program, the most closed first.

  Root needs no user namespace, and could not become nobody inside one.
  """
  unshare = shutil.which('unshare')
  if not unshare:
    return [[]]
  user = [] if os.geteuid() == 0 else ['--user']
  alone = ['--pid', '--fork', '--kill-child']
  closed = [unshare, *user, '--net', '--ipc', *alone]
  return [closed, [unshare, *user, *alone], []]


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
  """Returns a process's exit code, None at the deadline; kills its group."""
  try:
    return process.wait(seconds)
  except subprocess.TimeoutExpired:
    return None
  finally:
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _words(text: str) -> list[str]:
  """Returns the lines of an output, without blanks at their ends."""
  return [line.rstrip() for line in text.rstrip().splitlines()]
