"""Measures what the README claims; each benchmark is a module beside this one.

  python -m experiments.bench train [--only=speed,products,...]
  python -m experiments.bench decode [--only=speed,cache,layer,context]
  python -m experiments.bench checkpoint
  python -m experiments.bench precision [--config=FILE --steps=N --seeds=2 ...]

Prints a table and writes OUT/NAME.json and OUT/NAME.html. The peer of `train`
and `decode` runs where `--peer_python` (this Python by default) has torch and
transformers; each takes about ten minutes on two cores: leave the machine
alone meanwhile. `precision` trains a config in bf16, in each FP8 recipe, and
once more in bf16 with another rounding: how far two runs part without FP8.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from experiments.bench import checkpoint, decode, precision, train
from mla_moe.config import ConfigError

_BENCHMARKS = {
  'train': train.run,
  'decode': decode.run,
  'checkpoint': checkpoint.run,
  'precision': precision.run,
}


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
  parser.add_argument('--config', default='configs/tiny.py', help='precision')
  parser.add_argument('--steps', type=int, default=0, help='precision; 0: all')
  parser.add_argument('--seeds', type=int, default=1, help='precision')
  args = parser.parse_args()
  try:
    if args.rounds < 1:
      raise ConfigError(f'--rounds={args.rounds}: must be at least 1')
    if args.seeds < 1:
      raise ConfigError(f'--seeds={args.seeds}: must be at least 1')
    if args.steps < 0:
      raise ConfigError(f'--steps={args.steps}: must not be negative')
    args.out.mkdir(parents=True, exist_ok=True)
    _BENCHMARKS[args.which](args.out.resolve(), args)  # Orbax insists
  except (ConfigError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  main()
