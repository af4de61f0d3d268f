"""Measures what the README claims; each benchmark is a module beside this one.

  python -m experiments.bench train [--only=speed,products,...]
  python -m experiments.bench decode [--only=speed,cache,layer,context]

Prints a table and writes OUT/train.json and OUT/train.html, or decode's. The peer runs where
`--peer_python` (this Python by default) has torch and transformers. About ten
minutes on two cores; leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from experiments.bench import decode, train
from mla_moe.config import ConfigError

_BENCHMARKS = {'train': train.run, 'decode': decode.run}


def main() -> None:
  """Runs the benchmark that the command line names."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.bench', description=__doc__.split('\n')[0]
  )
  parser.add_argument('which', nargs='?', default='train', choices=_BENCHMARKS)
  parser.add_argument('--out', type=pathlib.Path, default='runs/bench')
  parser.add_argument('--peer_python', default=sys.executable)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--only', default='', help='parts, joined by commas')
  args = parser.parse_args()
  try:
    if args.rounds < 1:
      raise ConfigError(f'--rounds={args.rounds}: must be at least 1')
    args.out.mkdir(parents=True, exist_ok=True)
    _BENCHMARKS[args.which](args.out, args)
  except (ConfigError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  main()
