"""The samples of a run, samples.txt: texts under headings of their steps.

Like the rows of a run, they are cut back when the run goes back: a run that was
killed has each sample once. A model may write a heading of its own, which would
be cut as one; so a line of a text that begins like one is indented.
"""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Sequence

from mla_moe import files

FILE = 'samples.txt'
_HEADING = '--- step '


def append(path: pathlib.Path, step: int, texts: Sequence[str]) -> None:
  """Writes the texts, each below a heading and with a newline behind it."""
  with open(path, 'a', encoding='utf-8', errors='replace', newline='') as file:
    file.writelines(f'{_HEADING}{step}\n{_indented(text)}\n' for text in texts)


def rewind(path: pathlib.Path, step: int) -> None:
  """Drops the samples after `step`, and a line that a kill tore."""
  if not path.exists():
    return
  files.check_regular(path)
  with open(path, 'r+b') as file:
    lines = itertools.takewhile(lambda line: _is_until(line, step), file)
    file.truncate(sum(map(len, lines)))


def last(path: pathlib.Path) -> str:
  """Returns the last sample with the number of its step, '' without any."""
  if not path.exists():
    return ''
  files.check_regular(path)
  text = path.read_text(encoding='utf-8', errors='replace')
  return f'\n{text}'.rpartition(f'\n{_HEADING}')[2]


def _indented(text: str) -> str:
  return re.sub(f'^{_HEADING}', f' {_HEADING}', text, flags=re.MULTILINE)


def _is_until(line: bytes, step: int) -> bool:
  """Whether a line is whole, and no heading of a step after `step`."""
  heading = re.match(rb'--- step (\d{1,18})$', line)
  return line.endswith(b'\n') and not (heading and int(heading[1]) > step)
