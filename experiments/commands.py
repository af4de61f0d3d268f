"""How a program is started and how that is typed, in a clone and installed.

The folder is the package `experiments` in a clone, and `mla_moe.experiments`
where the package is installed: there the command mla-moe starts the programs.
"""

from __future__ import annotations

import re
import sys


def program(name: str) -> list[str]:
  """Returns the words that start a program, such as `train` or `bench`."""
  return [sys.executable, '-m', f'{__package__}.{name}']


def typed(text: str) -> str:
  """Returns a text with its commands as they are typed here."""
  if __package__ == 'experiments':
    return text
  text = text.replace('python -m experiments.', 'mla-moe ')
  return re.sub(r'configs/(\w+)\.py', r'\1', text)
