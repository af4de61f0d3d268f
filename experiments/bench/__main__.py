"""Measures every figure of the documentation, one benchmark at a time.

  python -m experiments.bench NAME [--out=runs/bench] [flags]
  python -m experiments.bench NAME --help

NAME is one of these; minutes are those of two CPU cores, which must be left
alone meanwhile:

{benchmarks}

Each prints a table, and most write it into OUT. The peer of `train` and
`decode` is transformers' DeepSeek-V3, that of `rl` TRL's trainer with it:
--peer_python names a Python that has torch, transformers and trl.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from mla_moe.config import ConfigError

from .. import cli, commands

_BENCHMARKS = {
  'train': 'training beside the peer; memory, experts, compile time (10)',
  'decode': 'decoding beside the peer; the cache, long contexts (10)',
  'rl': 'reinforcement beside TRL; fine-tuning beside pre-training (10)',
  'thought': 'written steps before answers, or none: reinforced alike (10)',
  'data': 'tokenising beside the library alone; a later start (6)',
  'checkpoint': 'the pause of a save beside Orbax alone, the seal (1)',
  'precision': "FP8's loss beside bf16's: whole runs, by recipe (25)",
  'sparse_quality': "sparse attention's loss beside dense: both stages (15)",
  'mesh': 'a step on 8 fake CPU devices beside one (2)',
  'slices': 'the meshes of the documentation compiled for their slices (60)',
  'huggingface_streaming': 'speed and memory of loading a checkpoint (15)',
  'mismatch': 'rollout beside trainer by precision, with routing replay (3)',
  'formats': 'speed and memory of loading each format of weights (5)',
  'sparse': 'sparse attention beside dense: length, decoding, a peer (20)',
  'real_size': 'V2-Lite whole from a frozen base (60, 32 GB of disk)',
  'card': 'all measurements of one NVIDIA GPU, which it needs (8 there)',
}


def main() -> None:
  """Runs the benchmark that the command line names; `train` if none."""
  lines = [f'  {name:21}  {line}' for name, line in _BENCHMARKS.items()]
  about = __doc__.format(benchmarks='\n'.join(lines))
  words = sys.argv[1:]
  if words[:1] in (['--help'], ['-h']):
    print(commands.typed(about))
    return
  name = 'train'
  if words and not words[0].startswith('-'):
    name, *words = words
  with cli.edge():
    if name not in _BENCHMARKS:
      names = ', '.join(_BENCHMARKS)
      raise ConfigError(f'{name!r}: is no benchmark; there are {names}')
    run(name, words)


def run(name: str, words: list[str]) -> None:
  """Runs the module of a benchmark with the flags in `words`.

  Raises:
    ConfigError: a number is too small, or --out is no folder.
  """
  benchmark = importlib.import_module(f'{__package__}.{name}')
  parser = argparse.ArgumentParser(
    prog=commands.typed(f'python -m experiments.bench {name}'),
    description=commands.typed(benchmark.__doc__),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--out', default='runs/bench')
  benchmark.flags(parser)
  args = parser.parse_args(words)
  for flag, value in vars(args).items():
    least = 0 if parser.get_default(flag) == 0 else 1  # 0 has a meaning there
    if type(value) is int and value < least:
      raise ConfigError(f'--{flag}={value}: must be at least {least}')
  args.out = cli.path('--out', args.out)
  try:
    args.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f'--out={args.out}: {error.strerror}') from None
  benchmark.run(args.out.resolve(), args)  # Orbax wants the whole path


if __name__ == '__main__':
  main()
