"""HTTP connections on which something moves: uvicorn's, with a time limit.

uvicorn waits for ever for the head of a request, and for a client that does
not read its answer. Each such connection holds a descriptor, so that a few
hundred of them shut all others out. Here a client is cut off after
`Protocol.seconds` in which it has sent no whole head, or has not read what lies
ready. A body has a limit of its own (`validation`); the model takes its time.
"""

from __future__ import annotations

from typing import Any

import uvicorn
from uvicorn.protocols.http import h11_impl

LIMIT = 512  # connections; with more, requests are answered by status 503


class Protocol(h11_impl.H11Protocol):
  """A connection that is cut off if its client stalls."""

  seconds = 60.0

  def connection_made(self, transport):
    super().connection_made(transport)
    self._timer, self._unread = None, False
    self._watch()

  def data_received(self, data):
    super().data_received(data)
    self._watch()

  def on_response_complete(self):
    super().on_response_complete()
    self._watch()

  def pause_writing(self):
    super().pause_writing()
    self._unread = True
    self._watch()

  def resume_writing(self):
    super().resume_writing()
    self._unread = False
    self._watch()

  def connection_lost(self, exc):
    super().connection_lost(exc)
    self._stop()

  def _watch(self) -> None:
    """Starts the timer if the client has the next move, and stops it if not.

    A timer that runs goes on: a byte now and then is no head.
    """
    owes_head = self.cycle is None or self.cycle.response_complete
    if not (owes_head or self._unread):
      self._stop()
    elif self._timer is None:
      self._timer = self.loop.call_later(self.seconds, self.transport.abort)

  def _stop(self) -> None:
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None


def settings(app: Any, host: str, port: int, **more: Any) -> uvicorn.Config:
  """Returns uvicorn's settings; `more` are others of its options."""
  return uvicorn.Config(
    app,
    host=host,
    port=port,
    http=Protocol,
    ws='none',
    limit_concurrency=LIMIT,
    **more,
  )
