"""A scheduler in a thread of its own, for asynchronous programs.

Other threads never touch the scheduler: they put calls into an inbox, which the
thread empties between two steps. So no event loop ever waits for a lock. A
submission's error is its caller's, and the scheduler itself ends the samples
of most others. After an error that it lets through, it is reset: rows that are
half cancelled would mix samples up. All samples end then, their clients hear of
it, and the next request is served. Only a reset that fails ends the thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
import traceback
from collections.abc import Callable

from .. import runtime
from .scheduler import Event, Scheduler


class Engine:
  """Runs the steps of a scheduler while it has samples.

  `length`: most tokens of a prompt and its answer; `failure`: the exception
  that ended the thread, or None.
  """

  def __init__(self, scheduler: Scheduler):
    self.length = scheduler.length
    self.failure: Exception | None = None
    self._resets = 0
    self._scheduler = scheduler
    # (call, the future of a caller that waits for it); (None, None) ends.
    self._inbox = queue.SimpleQueue()
    self._listeners = {}  # by ticket: (event loop, its queue, sample's index)
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  @property
  def status(self) -> dict:
    """The numbers of /healthz."""
    return {
      'free_pages': self._scheduler.free_pages,
      'open': len(self._listeners),
      'passes': self._scheduler.passes,
      'accepted_drafts': self._scheduler.accepted,
      'failures': self._scheduler.failures + self._resets,
    }

  async def submit(
    self, prompts: list, max_new_tokens: int, **options
  ) -> tuple[list[int], asyncio.Queue]:
    """Returns the tickets of the samples, and a queue of (index, Event).

    The index is that of a ticket; None in the queue means that the thread has
    failed. Arguments are those of `Scheduler.submit_all`.

    Raises:
      ConfigError, scheduler.Full: as `Scheduler.submit_all`.
      RuntimeError: the thread has ended.
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue()

    def call():
      tickets = self._scheduler.submit_all(prompts, max_new_tokens, **options)
      for index, ticket in enumerate(tickets):
        self._listeners[ticket] = loop, events, index
      return tickets

    done = concurrent.futures.Future()
    self._inbox.put((call, done))
    if self.failure:
      raise RuntimeError('the engine has stopped')
    try:
      return await asyncio.wrap_future(done), events
    except asyncio.CancelledError:
      done.add_done_callback(self._cancel_result)
      raise

  def cancel(self, tickets: list[int]) -> None:
    """Drops these samples before the next step; unknown ones are ignored."""

    def call():
      for ticket in tickets:
        if self._listeners.pop(ticket, None):
          self._scheduler.cancel(ticket)

    self._inbox.put((call, None))

  def close(self) -> None:
    """Ends the thread after its step."""
    self._inbox.put((None, None))
    self._thread.join()

  def _cancel_result(self, done: concurrent.futures.Future) -> None:
    """Cancels the tickets of a caller that has gone."""
    if not done.cancelled() and not done.exception():
      self.cancel(done.result())

  def _run(self) -> None:
    first = runtime.First()
    try:
      while True:
        try:
          if not self._work(first):
            return
        except Exception as error:  # of nobody's request in particular
          traceback.print_exception(error)
          self._resets += 1
          self._scheduler.reset()
          for ticket in list(self._listeners):
            self._send(Event(ticket, -1, 0.0, 'failed'))
    except Exception as error:  # every client must hear of it
      self.failure = error
      for loop, events, _ in self._listeners.values():
        with contextlib.suppress(RuntimeError):  # a loop that has been closed
          loop.call_soon_threadsafe(events.put_nowait, None)
      self._listeners.clear()
      with contextlib.suppress(queue.Empty):
        while True:
          _, done = self._inbox.get_nowait()
          if done and done.set_running_or_notify_cancel():
            done.set_exception(RuntimeError('the engine has stopped'))
      raise

  def _work(self, first: runtime.First) -> bool:
    """Makes the waiting calls and a step; returns False after the last one."""
    while not self._scheduler.busy or not self._inbox.empty():
      call, done = self._inbox.get()
      if call is None:
        return False
      if done:
        _answer(call, done)
      else:
        call()
    first.begin()
    events = self._scheduler.step()
    if events:
      first.end()
    for event in events:
      self._send(event)
    return True

  def _send(self, event: Event) -> None:
    listener = self._listeners.get(event.ticket)
    if listener is None:
      return
    loop, events, index = listener
    if event.reason:
      del self._listeners[event.ticket]
    with contextlib.suppress(RuntimeError):  # a loop that has been closed
      loop.call_soon_threadsafe(events.put_nowait, (index, event))


def _answer(call: Callable, done: concurrent.futures.Future) -> None:
  """Makes the call for its future, unless the caller has gone."""
  if done.set_running_or_notify_cancel():
    try:
      done.set_result(call())
    except Exception as error:  # the caller's
      done.set_exception(error)
