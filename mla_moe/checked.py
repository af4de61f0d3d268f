"""Dataclasses that check their own fields when they are built.

A field's annotation is its rule: `int` and `float` (finite, never negative),
`bool`, `str`, `tuple`, another checked dataclass, or a `Literal` with all the
choices. Rules that an annotation cannot express are in a class's `_rules`. An
error is one line for people, with the value, the rule and the fix. `thaw` and
`freeze` turn such a dataclass into a ConfigDict, whose keys people override,
and back; `migrated` moves the keys of older versions.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable
from typing import Any

import ml_collections

_LONGEST = 1000  # characters of a quoted list or value, each of its two ends


class ConfigError(ValueError):
  """A configuration that cannot be run; the message is one line for people.

  It may quote names of files that other people made, so that characters which
  a terminal would obey are escaped, and a long line loses its middle.
  """

  def __init__(self, message: str = ''):
    line = str(message)
    if len(line) > 2 * _LONGEST:
      line = f'{line[:_LONGEST]} [...] {line[-_LONGEST:]}'
    line = ' '.join(line.splitlines())
    escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in line)
    super().__init__(''.join(escaped))


class ConfigWarning(UserWarning):
  """A part of a person's files that is not used; one line for people."""


def few(names: Iterable[str]) -> str:
  """Returns the first three names in order, and the number of the others."""
  names = sorted(names)
  more = f' and {len(names) - 3:,} more' if names[3:] else ''
  return ', '.join(names[:3]) + more


def is_number(value: Any) -> bool:
  """Returns whether `value` is an int or a float; a bool is neither."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_row(row: object, *kinds: type) -> bool:
  """Whether a row of a field has these kinds, of which float is any number."""
  good = lambda x, kind: is_number(x) if kind is float else isinstance(x, kind)
  same = isinstance(row, tuple) and len(row) == len(kinds)
  return same and all(map(good, row, kinds))


def coerce(name: str, value: Any, kind: Any, least: int = 0) -> Any:
  """Returns `value` as `kind`; ints become floats, lists become tuples.

  Raises:
    ConfigError: `value` is not of this kind, or a number below `least`.
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
  if kind in (int, float) and value < least:
    rule = f'must be {least} or more' if least else 'must not be negative'
    raise ConfigError(f'{name}={value!r}: {rule}')
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
      least = field.metadata.get('least', 0)
      value = getattr(self, field.name)
      value = coerce(field.name, value, hints[field.name], least)
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


def thaw(config: Checked) -> ml_collections.ConfigDict:
  """Returns the config as a ConfigDict, which the command line overrides."""
  values = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    nested = dataclasses.is_dataclass(value)
    values[field.name] = thaw(value) if nested else value
  return ml_collections.ConfigDict(values)


def freeze(values: Any, cls: type, path: str) -> Any:
  """Returns the `cls` of a ConfigDict or of a dict from JSON.

  Raises:
    ConfigError: an unknown key (with the nearest name), a wrong type, a value
      that breaks a rule. The message starts with the key's path below `path`.
  """
  hints = typing.get_type_hints(cls)
  names = [field.name for field in dataclasses.fields(cls)]
  if not hasattr(values, 'items'):
    raise ConfigError(f'{path}={values!r}: must be a group of keys')
  kwargs = {}
  for name, value in values.items():
    if name not in names:
      near = difflib.get_close_matches(name, names, 1, 0)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      raise ConfigError(f'{path}.{name}: there is no such key{hint}')
    nested = dataclasses.is_dataclass(hints[name])
    kwargs[name] = (
      freeze(value, hints[name], f'{path}.{name}') if nested else _number(value)
    )
  try:
    return cls(**kwargs)
  except ConfigError as error:
    raise ConfigError(f'{path}.{error}') from None


def _number(value: Any) -> Any:
  """Returns numbers for references (`follow_run`), tuples for lists."""
  if isinstance(value, list | tuple):
    return tuple(map(_number, value))
  is_reference = isinstance(value, ml_collections.FieldReference)
  return value.get() if is_reference else value


# Keys of older versions, and their new places ('' is none).
_MOVED = {
  'model.remat': 'model.compute.remat',
  'model.fp8_impl': 'model.compute.fp8',
  'model.mla.impl': 'model.compute.attention',
  'model.moe.impl': 'model.compute.experts',
  'model.moe.exchange': 'model.compute.exchange',
  'data.loader': '',
}


def migrated(values: Any) -> Any:
  """Returns a copy with the keys of older versions in their new places."""
  values = copy.deepcopy(values)
  for old, new in _MOVED.items():
    *groups, name = old.split('.')
    group = values
    for key in groups:
      group = group.get(key) if hasattr(group, 'get') else None
    if not hasattr(group, 'get') or name not in group:
      continue
    value = group[name]
    del group[name]
    if not new:
      continue
    *groups, name = new.split('.')
    group = values
    for key in groups:
      group = group.setdefault(key, {})
    # 'tokamax' was a library's attention kernel.
    group[name] = 'auto' if value == 'tokamax' else value
  return values
