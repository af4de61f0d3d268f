"""The families of models with MLA: one network, many spellings.

Some fifteen families compute DeepSeek's network. They differ in the names of
its numbers (config.json) and of its tensors, in the values that a file may
leave out, and in the router. dialects.toml beside this file has these
differences as data, so that everything else reads and writes DeepSeek's words.

A key that is in none of its lists may change the model's numbers. So it is
refused, unless its value says "no": null, false, or empty.
"""

from __future__ import annotations

import fnmatch
import functools
import pathlib
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mla_moe.config import ConfigError


class Dialect(NamedTuple):
  """One family's way to write the model; dialects.toml explains the fields."""

  architectures: tuple[str, ...]
  scoring: str = 'sigmoid'
  methods: tuple[str, ...] = ('noaux_tc',)
  defaults: Mapping[str, Any] = {}
  keys: Mapping[str, str] = {}
  absent: str = ''
  own: str = ''
  tensors: Iterable[tuple[str, str]] = ()
  inner: tuple[str, ...] = ()
  prefix: str = ''
  stem: str = 'model'
  config: str = 'config.json'

  def spell(self, name: str) -> str:
    """Returns DeepSeek's name of a tensor as the family spells it."""
    for ours, theirs in self.tensors:
      name = name.replace(ours, theirs)
    return self.prefix + name


@functools.cache
def tables() -> dict[str, Any]:
  """Returns the content of dialects.toml."""
  path = pathlib.Path(__file__).with_name('dialects.toml')
  return tomllib.loads(path.read_text(encoding='utf-8'))


@functools.cache
def families() -> dict[str, Dialect]:
  """Returns {model_type: its dialect}, DeepSeek's own first."""
  table = tables()['family']
  return {
    name: Dialect(**table.get(own.pop('like', ''), {}) | own)
    for name, own in ((name, dict(own)) for name, own in table.items())
  }


def dialect(family: str) -> Dialect:
  """Returns the dialect of a family; '' is DeepSeek's own."""
  return families()[family or 'deepseek_v3']


def of(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
  """Returns the family of a config.json, and the config in DeepSeek's words.

  Another family, or a key that is not understood, is a ConfigError.
  """
  family = _family(values)
  own = dialect(family)
  if own.inner:
    text = values.get('text_config')
    kind = text.get('model_type') if isinstance(text, dict) else text
    if kind not in own.inner:
      raise ConfigError(
        f'text_config model_type={kind!r}: only {" and ".join(own.inner)} can '
        f'be loaded from {own.architectures[0]}'
      )
    values = {k: v for k, v in values.items() if k != 'text_config'} | text
  words = tables()['aliases'] | {x: ours for ours, x in own.keys.items()}
  flat: dict[str, Any] = {}
  for key, value in _flat(values, words).items():
    name = words.get(key, key)
    _check(family, name, value)
    if flat.setdefault(name, value) != value:
      raise ConfigError(
        f'{key}={value!r}: contradicts {name}={flat[name]!r}; leave one of '
        'them out'
      )
  return family, dict(own.defaults) | _grouped(flat)


def spelled(values: dict[str, Any], family: str) -> dict[str, Any]:
  """Returns a config in the words of a family: the inverse of `of`."""
  own = dialect(family)
  absent, flat = own.absent.split(), _flat(values, own.keys)
  out = _grouped(
    {own.keys.get(k, k): v for k, v in flat.items() if k not in absent}
  )
  if not own.inner:
    return out
  inner, outside = own.inner[-1], ('torch_dtype', 'quantization_config')
  outside += ('architectures', 'model_type')
  outer = {key: out[key] for key in outside if key in out}
  out |= {'architectures': dialect(inner).architectures, 'model_type': inner}
  out.pop('quantization_config', None)
  return outer | {'text_config': out}


def _flat(values: dict[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the values, with those objects in parts whose parts have a name."""
  groups = {name.split('.')[0] for name in names if '.' in name}
  flat: dict[str, Any] = {}
  for key, value in values.items():
    apart = key in groups and isinstance(value, dict)
    flat |= (
      {f'{key}.{k}': v for k, v in value.items()} if apart else {key: value}
    )
  return flat


def _grouped(flat: dict[str, Any]) -> dict[str, Any]:
  """Returns the objects of which `_flat` has made parts."""
  values: dict[str, Any] = {}
  for key, value in flat.items():
    group, _, part = key.rpartition('.')
    (values.setdefault(group, {}) if group else values)[part] = value
  return values


def _family(values: dict[str, Any]) -> str:
  """Returns the model_type whose dialect the config is in."""
  if 'n_layers' in values and 'kv_lora_rank' in values:
    return 'mistral_large_3'
  names, kind = values.get('architectures') or (), values.get('model_type')
  kind = tables()['aliases'].get(str(kind), str(kind))
  known = ', '.join(sorted({d.architectures[0] for d in families().values()}))
  if not isinstance(names, (list, tuple)) or len(names) > 1:
    raise ConfigError(f'architectures={names!r}: must name one of {known}')
  fitting = [
    family
    for family, own in families().items()
    if (str(names[0]) in own.architectures if names else kind == family)
  ]
  if not fitting:
    key = f'architectures={names[0]!r}' if names else f'model_type={kind!r}'
    raise ConfigError(f'{key}: only {known} can be loaded')
  if kind in families() and kind not in fitting:
    raise ConfigError(
      f'model_type={kind!r}: is not that of architectures={names[0]!r}; set '
      'both to those of the model'
    )
  return kind if kind in fitting else fitting[0]


def _check(family: str, key: str, value: Any) -> None:
  """Refuses a key that is not understood, but where its value says no."""
  data, last = tables(), key.split('.')[-1]
  types = data['types'].get(key, '').split()
  if value is not None and types and type(value).__name__ not in types:
    words = f'{repr(value)[:60]}: must be of type {" or ".join(types)}'
    raise ConfigError(f'{dialect(family).keys.get(key, key)}={words}')
  own = dialect(family)
  if key in (*data['read'].split(), *own.own.split(), *own.keys):
    return
  neutral = data['neutral'].get(key, ())
  if value is None or value is False or value in ('', [], {}, *neutral):
    return
  if any(fnmatch.fnmatchcase(last, name) for name in data['idle'].split()):
    return
  rule = f'only {neutral[0]!r} is computed' if neutral else 'is not understood'
  text = repr(value) if len(repr(value)) < 60 else f'{repr(value)[:60]}…'
  raise ConfigError(
    f'{key}={text}: {rule} for {family}; take the key out if it does not '
    'change the logits'
  )
