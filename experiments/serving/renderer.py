"""Renders a chat template in a process of its own: the child of `template`.

A template is a program that comes with a model. jinja2's sandbox keeps it from
files and attributes, but not from time (a loop in a loop in a loop) and memory
('x' * 10**9). The kernel's limits of a process bound both. So this file runs
as a program, and imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import json
import sys

SECONDS = 5  # of a processor
MEMORY = 2**29
LENGTH = 2**22  # characters of the chat


def _limit(seconds: int) -> None:
  import resource  # Windows has none: `cli` says so

  with contextlib.suppress(ValueError, OSError):  # macOS has not all of them
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _render(template: str, values: dict | None) -> str:
  from jinja2 import exceptions, sandbox

  def refuse(message):
    raise exceptions.TemplateError(message)

  world = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True
  )
  world.globals['raise_exception'] = refuse
  compiled = world.from_string(template)
  text = '' if values is None else compiled.render(values)
  if len(text) > LENGTH:
    raise exceptions.TemplateError(f'it makes more than {LENGTH} characters')
  return text


def main() -> None:
  """Reads a request of `template`; writes {'text'} or {'error'}, as JSON."""
  request = json.load(sys.stdin)
  _limit(request['seconds'])
  try:
    answer = {'text': _render(request['template'], request['values'])}
  except Exception as error:  # it is a program: it may raise anything
    line = ' '.join(f'{type(error).__name__}: {error!s:.400}'.split())
    answer = {'error': line[:200]}
  json.dump(answer, sys.stdout)


if __name__ == '__main__':
  main()
