"""Chats with a model in the terminal; its answers come as they are made.

  python -m experiments.chat --checkpoint=DIR [--system=TEXT]

Ctrl-C ends an answer, /reset forgets the chat, and /quit or Ctrl-D ends the
program. Each line of a pipe is a message, too. --chat_template=FILE is for a
model without a template of its own, such as one that was trained on bytes.

The chat decodes in one row of the server's scheduler, whose shapes are fixed:
only the first answer compiles.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from mla_moe.config import ConfigError

from . import cli, opened, runtime, text
from .serving import template

FLAGS = flags.FLAGS


def define() -> None:
  """Defines this program's flags."""
  opened.define()
  opened.define_sampling()
  template.define()
  flags.DEFINE_string('system', '', "The system's text.")
  flags.DEFINE_bool('special', False, "Read the messages' special tokens.")
  flags.DEFINE_integer('max_new_tokens', 512, 'Most tokens of an answer.', 1)
  flags.DEFINE_integer('length', 2048, 'Most tokens of the whole chat.', 2)


class Chat:
  """A chat: its messages so far, and the scheduler that answers.

  Args:
    model: the model, its tokenizer and template.
    scheduler: of the model; it has no other samples.
    system: the first message, '' for none.
    max_new_tokens: most of an answer.
    stops: texts that end an answer.
    special: the messages' special tokens are meant.
    knobs: of `sampling.make_knobs`.
  """

  def __init__(
    self,
    model: opened.TextModel,
    scheduler: Any,
    system: str = '',
    max_new_tokens: int = 512,
    stops: tuple[str, ...] = (),
    special: bool = False,
    **knobs: float,
  ):
    self._model, self._scheduler = model, scheduler
    self._system, self._limit = system, max_new_tokens
    self._stops, self._knobs, self._special = stops, knobs, special
    self._first = runtime.First()
    self.reset()

  def reset(self) -> None:
    """Forgets all messages but the system's."""
    self.messages = [('system', self._system)] if self._system else []

  def answer(self, message: str) -> Iterator[str]:
    """Yields the pieces of the answer.

    The message and its answer join the chat. An answer that its reader ends
    (`close`) joins as far as it came.

    Raises:
      ConfigError: a template that fails, or no room in the chat.
    """
    model, scheduler = self._model, self._scheduler
    messages = [*self.messages, ('user', message)]
    ids = template.encode(
      model.folder, model.tokenizer, messages, model.template, self._special
    )
    opened.check_ids(ids, model.config.vocab)
    room = scheduler.length - len(ids)
    if room < 1:
      raise ConfigError(
        f'the chat has {len(ids)} tokens, of at most {scheduler.length}: '
        '/reset it, or start with a larger --length'
      )
    (ticket,) = scheduler.submit(
      ids, min(self._limit, room), stop_ids=model.stop_ids, **self._knobs
    )
    said = ''
    try:
      for piece in self._pieces():
        said += piece
        yield piece
    finally:
      scheduler.cancel(ticket)
      self.messages = [*messages, ('assistant', said)]

  def _pieces(self) -> Iterator[str]:
    stream = text.TextStream(self._model.tokenizer, self._stops)
    while self._scheduler.busy and not stream.ended:
      self._first.begin()
      events = self._scheduler.step()
      if events:
        self._first.end()
      for event in events:
        if event.reason == 'broken':
          raise cli.Stopped('the logits are not finite')
        if event.reason == 'failed':
          raise cli.Stopped('an error has ended the answer')
        ids = [] if event.reason == 'stop' else [event.token]
        yield stream.add(ids, last=bool(event.reason))


def talk(chat: Chat, read: Callable[[], str], interactive: bool) -> None:
  """Answers the messages that `read` returns, until its EOFError or /quit.

  Raises:
    ConfigError: as `Chat.answer`, unless the chat is interactive.
  """
  while True:
    try:
      line = read().strip()
    except EOFError:
      return
    except KeyboardInterrupt:
      print('\n/quit or Ctrl-D ends the chat.', file=sys.stderr)
      continue
    if line == '/quit':
      return
    if line == '/reset':
      chat.reset()
    elif line.startswith('/'):
      print(f'{line}: there is only /reset and /quit', file=sys.stderr)
    elif line:
      try:
        _print(chat.answer(line))
      except ConfigError as error:
        if not interactive:
          raise
        print(f'error: {error}', file=sys.stderr)


def _print(pieces: Iterator[str]) -> None:
  """Prints an answer as it comes; Ctrl-C ends it after its step."""
  with contextlib.closing(pieces), _interrupts() as interrupts:
    for piece in pieces:
      text.show(piece)
      if interrupts:
        break
  print(flush=True)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
  """Yields a list that gets each SIGINT; a second one is KeyboardInterrupt.

  A step is never interrupted: half of it would leave the scheduler in pieces.
  """
  signals = []

  def note(number, _):
    if signals:
      raise KeyboardInterrupt
    signals.append(number)

  before = signal.signal(signal.SIGINT, note)
  try:
    yield signals
  finally:
    signal.signal(signal.SIGINT, before)


def main() -> None:
  """Chats until the input ends."""
  from .serving.scheduler import Scheduler

  own = template.own()
  model = opened.from_flags()._replace(template=own)
  scheduler = Scheduler(
    model.config,
    model.variables,
    rows=1,
    length=FLAGS.length,
    cache=model.cache,
    speculative=FLAGS.speculative,
  )
  chat = Chat(
    model,
    scheduler,
    FLAGS.system,
    FLAGS.max_new_tokens,
    tuple(FLAGS.stop),
    FLAGS.special,
    **opened.knobs(),
  )
  sys.stdin.reconfigure(errors='replace')
  interactive = sys.stdin.isatty()
  if interactive:
    with contextlib.suppress(ImportError):  # arrows and history, where it is
      import readline  # noqa: F401
  talk(chat, lambda: input('> ' if interactive else ''), interactive)


if __name__ == '__main__':
  cli.run(main, define)
