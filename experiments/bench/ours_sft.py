"""Our fine-tuning as a contender, and our pre-training at the same shape."""

from __future__ import annotations

import json
import sys

from . import turns


def main() -> None:
  """The contender; the mode is 'pre-training' or 'fine-tuning'."""
  job = json.loads(sys.stdin.readline())
  turns.pin()
  import jax

  from ..training import example_source, source
  from . import rl

  is_text = job['mode'] == 'pre-training'
  opened = source.open_text if is_text else example_source.opened()
  clock = turns.Turns(f'jax {jax.__version__}', ('update',))
  clock.run(rl.tuned(job['shape']['questions']), opened)


if __name__ == '__main__':
  main()
