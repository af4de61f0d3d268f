"""Dataclasses that check their own fields when they are built.

A field's annotation is its rule: `int` and `float` (finite, never negative),
`bool`, `str`, `tuple`, another checked dataclass, or a `Literal` with all the
choices. Rules that an annotation cannot express are in a class's `_rules`. An
error is one line for people, with the value, the rule and the fix.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any


class ConfigError(ValueError):
  """A configuration that cannot be run; the message is one line for people."""


def is_number(value: Any) -> bool:
  """Returns whether `value` is an int or a float; a bool is neither."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def coerce(name: str, value: Any, kind: Any) -> Any:
  """Returns `value` as `kind`; ints become floats, lists become tuples.

  Raises:
    ConfigError: `value` is not of this kind.
  """
  if typing.get_origin(kind) is typing.Literal:
    choices = typing.get_args(kind)
    if value not in choices:
      raise ConfigError(
        f'{name}={value!r}: must be one of {", ".join(choices)}'
      )
    return value
  if kind is float and is_number(value):
    value = float(value)
    if not math.isfinite(value):
      raise ConfigError(f'{name}={value!r}: must be a finite number')
  if kind is tuple and isinstance(value, (list, tuple)):
    value = tuple(
      tuple(x) if isinstance(x, (list, tuple)) else x for x in value
    )
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ConfigError(
      f'{name}={value!r}: must be of type {kind.__name__}, not '
      f'{type(value).__name__}'
    )
  if kind in (int, float) and value < 0:
    raise ConfigError(f'{name}={value!r}: must not be negative')
  return value


def check_divides(part_name: str, part: int, whole_name: str, whole: int):
  """Raises a ConfigError unless `part` divides `whole`."""
  if whole % part:
    raise ConfigError(f'{part_name}={part}: must divide {whole_name}={whole}')


@dataclasses.dataclass(frozen=True)
class Checked:
  """Base of the configs: checks every field's type, then calls `_rules`."""

  def __post_init__(self):
    hints = typing.get_type_hints(type(self))
    for field in dataclasses.fields(self):
      value = coerce(field.name, getattr(self, field.name), hints[field.name])
      object.__setattr__(self, field.name, value)
    self._rules()

  def _rules(self):
    pass

  def _require(self, name: str, good: bool, rule: str):
    if not good:
      raise ConfigError(f'{name}={getattr(self, name)!r}: {rule}')

  def _positive(self, *names: str):
    for name in names:
      self._require(name, getattr(self, name) > 0, 'must be at least 1')
