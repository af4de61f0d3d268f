"""The body of a request as JSON, and its fields by their types.

Nothing in it is trusted: neither its length, nor its pace, nor the size of any
number. A refusal names the field and its value.
"""

from __future__ import annotations

import asyncio
import json
import reprlib
from collections.abc import Sequence
from typing import Any

from starlette import requests

_SECONDS = 60
_LARGEST = 2**64  # of every number


class Refused(Exception):
  """An answer of another status than 200, which names the field."""

  def __init__(
    self, status: int, message: str, field: str = '', code: str = ''
  ):
    super().__init__(message)
    self.status, self.field, self.code = status, field, code


async def read_body(
  request: requests.Request, limit: int, origins: Sequence[str] = ()
) -> dict:
  """Returns the JSON object of a request's body.

  Args:
    request: of a client.
    limit: bytes of the body.
    origins: web pages that may be clients.

  Raises:
    Refused: the body is none, has more than `limit` bytes, does not come, or
      comes from another web page.
  """
  origin = request.headers.get('origin')
  if origin is not None and origin not in origins:
    raise Refused(
      403,
      f'origin: requests of web pages are not answered; start the server with '
      f'--origin={origin[:80]!r} for this one',
    )
  kind = request.headers.get('content-type', '').split(';')[0].strip().lower()
  if kind != 'application/json':  # pages may send any text without asking
    raise Refused(
      415, f'content-type: is {kind[:80]!r}, must be application/json'
    )
  data = bytearray()
  try:
    async with asyncio.timeout(_SECONDS):
      async for part in request.stream():
        data += part
        if len(data) > limit:
          raise Refused(413, f'the body is longer than {limit} bytes')
  except TimeoutError:
    raise Refused(
      408, f'the body has not come within {_SECONDS} seconds'
    ) from None
  try:
    body = json.loads(bytes(data))
  except (ValueError, RecursionError):
    raise Refused(400, 'the body is no JSON') from None
  if not isinstance(body, dict):
    raise Refused(400, 'the body is no JSON object')
  return body


def wrong(field: str, value: object, rule: str) -> Refused:
  """Returns the refusal of a field's value, whatever the value is."""
  try:
    shown = reprlib.repr(value)[:80]
  except Exception:  # a number of too many digits, or too deep a list
    shown = '...'
  name = repr(field[:80])[1:-1]  # no line break, and no half a character
  return Refused(400, f'{name}={shown}: {rule}', name)


class Fields:
  """The fields of a body by their types; null is the default."""

  def __init__(self, body: dict):
    self._body = body

  def value(self, field: str, default: object) -> Any:
    value = self._body.get(field)
    return default if value is None else value

  def text(self, field: str) -> str:
    value = self.value(field, '')
    if not isinstance(value, str):
      raise wrong(field, value, 'must be a text')
    return value

  def flag(self, field: str, default: bool = False) -> bool:
    value = self.value(field, default)
    if not isinstance(value, bool):
      raise wrong(field, value, 'must be true or false')
    return value

  def real(self, field: str, default: float) -> float:
    value = self.value(field, default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) < _LARGEST:
      raise wrong(field, value, 'must be a number below 2**64')
    return value

  def integer(
    self, field: str, default: int, low: int = -_LARGEST, high: int = _LARGEST
  ) -> int:
    if self.value(field, None) is None:
      return default
    value = self.real(field, default)
    if value != int(value) or not low <= value <= high:
      limits = f' from {low} to {high}' if high < _LARGEST else ''
      raise wrong(field, value, f'must be a whole number{limits}')
    return int(value)

  def table(self, field: str) -> dict:
    value = self.value(field, {})
    if not isinstance(value, dict):
      raise wrong(field, value, 'must be an object')
    return value
