"""Tokenises the text of a config, by many processes and on many machines.

  python -m experiments.prepare --config=configs/tiny.py --workdir=runs/tiny
  python -m experiments.prepare --workdir=runs/tiny --processes=16 --shard=3/8

A run with the same --workdir finds the tokens, in `.corpus` beside its folder;
without them, `train` tokenises by itself, in one process. A kill costs the unit
that each process was writing: the same command goes on.

With --shard=i/n a machine writes each n-th unit of the text, from the i-th, of
0 to n - 1, into a folder that the machines share. The same command without it
comes last: it writes units that are missing, and joins all. The tokens are the
same for any number of processes and machines. --verify reads them all, and
compares their checksums.
"""

from __future__ import annotations

import os
import pathlib
import re
import time

from absl import flags

from mla_moe.config import Config, ConfigError

from . import cli, run_tokenizer, workdir
from .checkpointing import bucket
from .data import batches, blend, corpus, corpus_folder, mixture, tokenizer
from .training import signals

FLAGS = flags.FLAGS


def define() -> None:
  """Defines this program's flags."""
  cli.define()
  text = 'Processes that tokenise; 0 is one a core.'
  flags.DEFINE_integer('processes', 0, text, 0)
  flags.DEFINE_string('shard', '', "This machine's units: i/n, from 0/n.")
  flags.DEFINE_bool('verify', False, 'Compare all checksums.')


def share_of(text: str) -> tuple[int, int]:
  """Returns (i, n) of --shard=i/n.

  Raises:
    ConfigError: another form, or no i from 0 to n - 1.
  """
  match = re.fullmatch(r'(\d{1,6})/(\d{1,6})', text)
  share = (int(match[1]), int(match[2])) if match else (0, 0)
  if not share[0] < share[1]:
    raise ConfigError(
      f'--shard={text}: must be i/n with i from 0 to n - 1, such as 0/8'
    )
  return share


def run(
  config: Config,
  folder: pathlib.Path,
  processes: int = 1,
  shard: str = '',
  verify: bool = False,
) -> None:
  """Prepares the text of a run in `folder`, and prints a table of it.

  Raises:
    ConfigError: as `corpus.prepare`.
  """
  share = share_of(shard) if shard else None
  config = run_tokenizer.resolved(folder, config)
  model, data = config.model, config.data
  words = tokenizer.load(
    data.tokenizer, model.bos_id, model.eos_id, model.vocab
  )
  cache = folder.parent / '.corpus'
  count = processes or os.cpu_count() or 1
  singles, texts = blend.singles(data), []
  for name, one in singles.items():
    began = time.monotonic()
    with blend.named('data.sources', name):
      if share:
        corpus.prepare_share(one, words, cache, share, processes=count)
        continue
      text = corpus.prepare(one, words, cache, processes=count)
      corpus_folder.check(text, one, rows=int(len(singles) > 1))
    texts.append(text.train)
    if verify:
      print(f'{corpus_folder.verify(text):,} tokens have their checksums.')
    if name:
      print(f'{name}:')
    for fact, value in corpus_folder.table(text):
      print(f'  {fact:26} {value}')
    place = cache / text.fingerprint
    place = place if place.exists() else one.source  # ids stay where they lie
    print(f'In {place}, {time.monotonic() - began:.1f} s.')
  for name, one in blend.validations(data).items() if texts else ():
    with blend.named('data.validation', name):
      text = corpus.prepare(one, words, cache, processes=count)
      tokens = len(blend.whole(text, one))
    print(f'{name}, for validation: {tokens:,} tokens')
    if verify:
      print(f'{corpus_folder.verify(text):,} tokens have their checksums.')
  if texts:
    sequences, _ = batches.span(data, config.run.steps)
    for name, times in mixture.epochs(data, texts, sequences).items():
      print(f'{config.run.steps:,} steps: {times:.3g} epochs {name}'.rstrip())
    blend.check(config, texts)


def main() -> None:
  """Prepares the text of the flags; a signal ends it, and loses no unit."""
  config = cli.config()
  folder = bucket.home(cli.run_folder('--workdir', FLAGS.workdir))
  with signals.Stop() as stop:
    try:
      with stop.at_once():
        run(
          config,
          folder,
          FLAGS.processes,
          FLAGS.shard,
          FLAGS.verify,
        )
    except OSError as error:
      if error.errno not in workdir.DISK:
        raise
      cache = folder.parent / '.corpus'
      raise cli.Stopped(workdir.trouble(cache, error)) from error
    except signals.Stopped as signal:
      print(
        f'Stopped by {signal}: units that are done stay, and the same command '
        'goes on.'
      )


if __name__ == '__main__':
  cli.run(main, define)
