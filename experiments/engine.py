"""A scheduler in a thread of its own, for programs that wait asynchronously."""

from __future__ import annotations

import asyncio
import threading

from experiments import scheduler


class Engine:
  """Runs a scheduler's steps while it has anything to do.

  `submit` gives a queue of (sample's index, Event); None in it says that the
  thread has failed. Call it, and `cancel`, from an event loop.
  """

  def __init__(self, work: scheduler.Scheduler):
    self._work = work
    self._turn = threading.Condition()
    self._queues = {}
    self._ending = False
    self.failure = None
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  @property
  def length(self) -> int:
    """Tokens of a prompt and its answer, at most."""
    return self._work.length

  @property
  def rows(self) -> dict:
    """What /healthz tells of it."""
    return {'free_pages': self._work.free_pages, 'open': len(self._queues)}

  async def submit(self, ids, new: int, **more) -> tuple[list, asyncio.Queue]:
    """Tickets of the samples, and where their events come.

    Raises:
      ConfigError, scheduler.Full: as `Scheduler.submit`.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue()

    def put():
      with self._turn:
        if self.failure:
          raise RuntimeError('the engine has stopped')
        tickets = self._work.submit(ids, new, **more)
        for index, ticket in enumerate(tickets):
          self._queues[ticket] = loop, queue, index
        self._turn.notify()
        return tickets

    # The thread holds the lock for a whole step: the loop must not wait for it.
    return await asyncio.to_thread(put), queue

  async def cancel(self, tickets: list) -> None:
    """Frees what these samples hold; those that have ended are ignored."""

    def drop():
      with self._turn:
        for ticket in tickets:
          if self._queues.pop(ticket, None):
            self._work.cancel(ticket)

    await asyncio.to_thread(drop)

  def close(self) -> None:
    """Ends the thread after its step."""
    with self._turn:
      self._ending = True
      self._turn.notify()
    self._thread.join()

  def _run(self) -> None:
    try:
      while True:
        with self._turn:
          self._turn.wait_for(lambda: self._ending or self._work.busy)
          if self._ending:
            return
          for event in self._work.step():
            self._tell(event)
    except Exception as error:  # every client must hear of it
      with self._turn:
        self.failure = error
        for loop, queue, _ in self._queues.values():
          loop.call_soon_threadsafe(queue.put_nowait, None)
        self._queues.clear()
      raise

  def _tell(self, event: scheduler.Event) -> None:
    found = self._queues.get(event.ticket)
    if found is None:
      return
    loop, queue, index = found
    if event.reason:
      del self._queues[event.ticket]
    loop.call_soon_threadsafe(queue.put_nowait, (index, event))
