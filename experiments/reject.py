"""Rejection sampling: a model's right answers become examples to imitate.

  python -m experiments.reject --checkpoint=runs/r1/rl --task=sort8 \\
    --out=runs/chosen.jsonl --samples=8 --max_new_tokens=10

A model answers training questions, the answers are graded, and the shortest
right one to each question is written (R1, section 2.3). `experiments.sft
--data=FILE.jsonl` learns from the file: a base model, and it is R1's third
stage; a smaller model, and it is distillation. The teacher is --checkpoint.

An answer is kept if each of --reward is 1 and if it has ended: a cut one would
teach to stop there. Answers follow from --seed, the number of the question and
that of the sample alone. So they depend on no batch, and the same command, or
one with more --questions, goes on after a kill: FILE.jsonl.drawn has all
questions so far, and FILE.jsonl is written from it at the end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Iterator

import numpy as np
from absl import flags

from mla_moe.config import ConfigError, RLConfig

from . import cli, opened, workdir
from .rl import grading, prompts, questions, rewards, rollouts
from .serving import template

FLAGS = flags.FLAGS
_TRIES = 64  # draws of a task for one question that is not there yet
_SECONDS = 10  # between two lines of progress


def define() -> None:
  """Defines this program's flags."""
  opened.define()
  template.define()
  flags.DEFINE_string('task', '', 'Questions: sort8, or FILE.jsonl.')
  cli.define_path('out', '', 'The .jsonl file of right answers.')
  flags.DEFINE_integer('questions', 1000, 'At most so many.', 1)
  flags.DEFINE_integer('samples', 16, 'Answers to each question.', 1)
  flags.DEFINE_integer('keep', 1, 'At most so many rows of a question.', 1)
  flags.DEFINE_integer('max_new_tokens', 64, 'Of an answer, at most.', 1)
  flags.DEFINE_float('temperature', 1.0, 'Of the draws.', 0.0)
  flags.DEFINE_integer('rows', 256, 'Answers that are drawn at a time.', 1)
  flags.DEFINE_enum(
    'template', 'plain', ['plain', 'r1_zero', 'chat'], 'Makes prompts.'
  )
  flags.DEFINE_list(
    'reward', ['accuracy'], f'All must be 1; of {", ".join(grading.NAMES)}.'
  )
  flags.DEFINE_bool('allow_code', False, 'Run the programs of answers.')
  flags.DEFINE_integer('seed', 0, 'Of the questions and the draws.', 0)


def run(
  model: opened.TextModel,
  rl: RLConfig,
  out: pathlib.Path,
  *,
  seed: int = 0,
  keep: int = 1,
  allow_code: bool = False,
) -> dict[str, float]:
  """Writes right answers to `rl.prompts` questions, and returns the counts.

  Args:
    model: the teacher.
    rl: `task`, `template`, `rewards`, `prompts`, `samples`, `max_new`,
      `temperature` and `rows` count here.
    out: the file, FILE.jsonl.
    seed: of the questions and the draws.
    keep: rows of a question, at most.
    allow_code: whether answers may be run as programs.

  Raises:
    ConfigError: names the flag and the fix.
    cli.Stopped: no answer was right.
  """
  source = questions.source(rl.task, seed)
  maker = prompts.Prompts(
    rl.template, model.tokenizer, model.folder, model.template
  )
  folder = out.with_name(f'{out.name}.drawn')
  if out.exists() and not folder.exists():
    raise ConfigError(
      f'--out={str(out)!r}: is there already, and there is no {folder.name} '
      'beside it to go on from; name another file'
    )
  items = distinct(source, rl.prompts)
  if len(items) < rl.prompts:
    print(f'{rl.task} has {len(items):,} different questions for training.')
  grader = grading.Grader(
    source,
    dict(rl.rewards),
    longest=rl.max_new,
    allow_code=allow_code,
    template=maker.template,
  )
  begun = lambda folder: any(workdir.backwards(folder / 'rows'))
  with workdir.lock(folder, begun), grader:
    done = len(workdir.rows(folder / 'rows', change=lambda row: None))
    flags = {'seed': seed, 'keep': keep}
    settings = flags | _settings(model, source, rl)
    _bind(folder / 'settings', settings, out, done)
    if done < len(items):
      if grader.about:
        print(f'Rewards: {grader.about}.')
      rows = _answered(
        model, rl, maker, grader, items, done, seed=seed, keep=keep
      )
      _append(folder / 'rows', rows, done, len(items))
    return _finished(folder, out, len(items), rl.samples)


def distinct(source: questions.Source, count: int) -> list[questions.Question]:
  """Returns the first `count` different questions for training, or all."""
  items: dict[str, questions.Question] = {}
  for index in range(source.size or _TRIES * count):
    item = source.train(index)
    items.setdefault(item.text, item)
    if len(items) == count:
      break
  return list(items.values())


def _settings(model, source, rl: RLConfig) -> dict:
  """Returns all that answers depend on, but for the last bits of numbers.

  The weights are there by a hash, so that no file has two teachers.
  """
  from .checkpointing import fingerprint

  values, _ = fingerprint.read(fingerprint.of(model.variables))
  names = 'template', 'rewards', 'samples', 'max_new', 'temperature'
  return {name: getattr(rl, name) for name in names} | {
    'task': source.fingerprint,
    'checkpoint': hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16],
    'chat_template': model.template,
    'cache': dataclasses.asdict(model.cache),
  }


def _bind(
  path: pathlib.Path, settings: dict, out: pathlib.Path, done: int
) -> None:
  """Writes the settings, or refuses others than those of the rows `done`."""
  text = json.dumps(settings)
  if not done:
    path.with_name('finished').unlink(missing_ok=True)
    workdir.write(path, text)
  before, now = json.loads(path.read_text(encoding='utf-8')), json.loads(text)
  wrong = [name for name in now if now[name] != before.get(name)]
  if wrong:
    values = ', '.join(f'{name}={before.get(name)!r}' for name in wrong)
    raise ConfigError(
      f'--out={str(out)!r}: was begun with another {" and ".join(wrong)} '
      f'({values}); name another file'
    )


def _answered(
  model, rl, maker, grader, items, done, *, seed, keep
) -> Iterator[dict]:
  """Yields a row of FILE.jsonl.drawn for each question from `done` on.

  A part of the questions that a kill cut is drawn again as a whole, so that the
  programs and their numbers are those of a run that nothing disturbs.
  """
  each = rl.samples
  seeds = [rollouts.seeds(seed, i, each) for i in range(len(items))]
  ids = [maker.ids(item) for item in items]
  opened.check_ids([max(row) for row in ids], model.config.vocab)
  per_part = rollouts.per_part(rl, each, len(items))
  number = done // per_part * per_part
  for drawn in rollouts.parts(
    model.config,
    rl,
    model.variables,
    ids,
    np.concatenate(seeds),
    number,
    stop_ids=model.stop_ids,
    cache=model.cache,
  ):
    part = items[number : number + len(drawn.ended)]
    texts = [_text(model, tokens) for tokens in drawn.tokens]
    lengths = drawn.lengths
    repeated = [item for item in part for _ in range(each)]
    grades = grader.grade(repeated, texts, lengths)
    for q, item in enumerate(part):
      mine = slice(q * each, (q + 1) * each)
      right = [_is_right(grade) for grade in grades[mine]]
      ended = drawn.ended[q]
      good = [
        (length, text)
        for length, text, *is_good in zip(
          lengths[mine], texts[mine], right, ended, strict=True
        )
        if all(is_good)
      ]
      if number + q >= done:
        yield {
          'right': sum(right),
          'cut': int((~ended).sum()),
          'errors': sum(bool(grade.error) for grade in grades[mine]),
          'rows': [maker.row(item, text) for text in _shortest(good, keep)],
        }
    number += len(part)


def _text(model: opened.TextModel, tokens: np.ndarray) -> str:
  return model.tokenizer.decode([i for i in tokens if i not in model.stop_ids])


def _is_right(grade: grading.Graded) -> bool:
  return not grade.error and all(part >= 1 for part in grade.parts.values())


def _shortest(answers: list[tuple[int, str]], most: int) -> list[str]:
  """Returns the different texts of the shortest (tokens, text) pairs.

  Of equally long ones the first come first. Empty texts and broken characters
  are left out: they are no text that the model wrote.
  """
  texts = dict.fromkeys(
    text
    for _, text in sorted(answers, key=lambda pair: pair[0])
    if text and '\ufffd' not in text
  )
  return list(texts)[:most]


def _append(path: pathlib.Path, rows: Iterator[dict], done: int, count: int):
  """Appends the rows to the file, with a line of progress now and then."""
  file, last = workdir.Rows(path), time.monotonic()
  right = drawn = 0
  if done:
    print(f'{done:,} of {count:,} questions are answered already.')
  try:
    for row in rows:
      file.append(row)
      done, drawn, right = done + 1, drawn + 1, right + bool(row['rows'])
      if time.monotonic() - last > _SECONDS or done == count:
        last = time.monotonic()
        print(
          f'{done:,} of {count:,} questions; of the last {drawn:,}, '
          f'{right / drawn:.1%} have a row',
          flush=True,
        )
  finally:
    try:
      file.close()
    except OSError as error:
      raise cli.Stopped(workdir.trouble(path, error)) from None


def _finished(
  folder: pathlib.Path, out: pathlib.Path, count: int, samples: int
) -> dict[str, float]:
  """Prints the counts, and writes FILE.jsonl unless it is finished already.

  Raises:
    cli.Stopped: there is no row.
  """
  names = 'right', 'cut', 'errors'
  counts = workdir.rows(
    folder / 'rows',
    change=lambda row: (*(row[name] for name in names), len(row['rows'])),
  )[:count]
  right, cut, errors, rows = zip(*counts, strict=True)
  answers = count * samples
  pass_at_1 = sum(right) / answers
  pass_at_k = sum(rewards.pass_at_k(samples, n, samples) for n in right) / count
  print(
    f'{sum(right):,} of {answers:,} answers right: pass@1 {pass_at_1:.1%}, '
    f'pass@{samples} {pass_at_k:.1%}; {sum(cut):,} cut at --max_new_tokens, '
    f'{sum(errors):,} not graded'
  )
  if not any(rows):
    raise cli.Stopped(
      f'{out}: no right answer has ended; fine-tune the teacher first, or with '
      'another --out try more --samples, --max_new_tokens or a --template'
    )
  mark = folder / 'finished'
  if (
    out.exists()
    and mark.exists()
    and mark.read_text(encoding='utf-8') == f'{count}'
  ):
    print('Finished before; nothing is written again.')
  else:
    _write(folder, out, count)
    workdir.write(mark, f'{count}')
  solved = sum(map(bool, rows))
  print(f'{out}: {sum(rows):,} rows of {solved:,} of {count:,} questions')
  return {
    'right': sum(right), 'rows': sum(rows), 'cut': sum(cut),
    'errors': sum(errors), 'pass_at_1': pass_at_1, 'pass_at_k': pass_at_k,
  }  # fmt: skip


def _write(folder: pathlib.Path, out: pathlib.Path, count: int) -> None:
  """Replaces FILE.jsonl by the rows of the first `count` questions."""
  scratch = out.with_name(f'{out.name}.new')
  with (
    open(folder / 'rows', encoding='utf-8') as drawn,
    open(scratch, 'w', encoding='utf-8') as file,
  ):
    for line in itertools.islice(drawn, count):
      rows = json.loads(line)['rows']
      file.writelines(f'{json.dumps(row)}\n' for row in rows)
    file.flush()
    os.fsync(file.fileno())
  os.replace(scratch, out)


def main() -> None:
  """Draws, grades and writes as the flags say."""
  for name in ('task', 'out'):
    if not FLAGS[name].value:
      raise ConfigError(f'--{name}: is empty')
  out = pathlib.Path(FLAGS.out)
  if out.suffix != '.jsonl':
    raise ConfigError(f'--out={FLAGS.out!r}: must end in .jsonl')
  rl = RLConfig(
    task=FLAGS.task,
    template=FLAGS.template,
    rewards=tuple((name, 1.0) for name in FLAGS.reward),
    prompts=FLAGS.questions,
    samples=FLAGS.samples,
    minibatches=1,
    max_new=FLAGS.max_new_tokens,
    temperature=FLAGS.temperature,
    rows=max(FLAGS.rows // FLAGS.samples, 1) * FLAGS.samples,
    scale='none',  # there are no advantages
  )
  own = template.own()
  run(
    opened.from_flags()._replace(template=own),
    rl,
    out,
    seed=FLAGS.seed,
    keep=FLAGS.keep,
    allow_code=FLAGS.allow_code,
  )


if __name__ == '__main__':
  cli.run(main, define)
