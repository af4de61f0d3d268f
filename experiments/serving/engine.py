"""A scheduler in a thread of its own, for programs that wait asynchronously."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable

from experiments.serving import scheduler


class Engine:
  """Runs a scheduler's steps while it has anything to do.

  What is asked of it goes through an inbox, which the thread empties between
  two steps: no event loop ever waits for a lock.
  """

  def __init__(self, work: scheduler.Scheduler):
    self.length = work.length  # tokens of a prompt and its answer, at most
    self.failure: Exception | None = None
    self._work, self._inbox, self._queues = work, queue.SimpleQueue(), {}
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  @property
  def rows(self) -> dict:
    """What /healthz tells of it."""
    return {
      'free_pages': self._work.free_pages,
      'open': len(self._queues),
      'passes': self._work.passes,
      'accepted_drafts': self._work.accepted,
    }

  async def submit(self, ids, new: int, **more) -> tuple[list, asyncio.Queue]:
    """Tickets of the samples, and where (sample's index, Event) come; a None
    there says that the thread has failed.

    Raises:
      ConfigError, scheduler.Full: as `Scheduler.submit`.
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue()

    def put():
      tickets = self._work.submit(ids, new, **more)
      for index, ticket in enumerate(tickets):
        self._queues[ticket] = loop, events, index
      return tickets

    done = concurrent.futures.Future()
    self._inbox.put((put, done))
    if self.failure:
      raise RuntimeError('the engine has stopped')
    try:
      return await asyncio.wrap_future(done), events
    except asyncio.CancelledError:
      done.add_done_callback(self._disown)
      raise

  def cancel(self, tickets: list) -> None:
    """Frees what these samples hold, soon; those that ended are ignored."""

    def drop():
      for ticket in tickets:
        if self._queues.pop(ticket, None):
          self._work.cancel(ticket)

    self._inbox.put((drop, concurrent.futures.Future()))

  def close(self) -> None:
    """Ends the thread after its step."""
    self._inbox.put((None, None))
    self._thread.join()

  def _disown(self, done: concurrent.futures.Future) -> None:
    """Nobody waits for these tickets any more."""
    if not done.cancelled() and not done.exception():
      self.cancel(done.result())

  def _run(self) -> None:
    try:
      while True:
        while not self._work.busy or not self._inbox.empty():
          act, done = self._inbox.get()
          if act is None:
            return
          _do(act, done)
        for event in self._work.step():
          self._tell(event)
    except Exception as error:  # every client must hear of it
      self.failure = error
      for loop, events, _ in self._queues.values():
        loop.call_soon_threadsafe(events.put_nowait, None)
      self._queues.clear()
      with contextlib.suppress(queue.Empty):
        while True:
          _, done = self._inbox.get_nowait()
          if done and done.set_running_or_notify_cancel():
            done.set_exception(RuntimeError('the engine has stopped'))
      raise

  def _tell(self, event: scheduler.Event) -> None:
    found = self._queues.get(event.ticket)
    if found is None:
      return
    loop, events, index = found
    if event.reason:
      del self._queues[event.ticket]
    with contextlib.suppress(RuntimeError):  # a loop that has been closed
      loop.call_soon_threadsafe(events.put_nowait, (index, event))


def _do(act: Callable, done: concurrent.futures.Future) -> None:
  """`act`, unless who asked for it has gone."""
  if done.set_running_or_notify_cancel():
    try:
      done.set_result(act())
    except Exception as error:  # for who asked
      done.set_exception(error)
