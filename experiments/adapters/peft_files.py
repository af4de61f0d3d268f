"""Adapters in the format of the library PEFT: adapter_model.safetensors.

A file has lora_A [r, in] and lora_B [out, r] of each matrix of a release, under
its name there. Our A and B are the same numbers in the order of our leaves, so
the table of released tensors (`mla_moe.hf.names`) moves B's rows as it moves a
weight's: a matrix whose columns are the ranks. Experts are one tensor in
transformers 5, and one parameter for PEFT: A [E r, in], and B [out, r E] with
the experts last. PEFT wraps a module once for each of its parameters, so that
the first of them is `base_layer`. PEFT (0.21) has no adapters for the dense and
shared MLPs of a model with experts: it takes their names for the experts'.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from mla_moe import files
from mla_moe.config import ConfigError, LoRAConfig, ModelConfig
from mla_moe.hf import names, safetensors
from mla_moe.types import PyTree

from . import codes, lora

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_EXPERTS = {'gate_up_proj': 'experts.base_layer', 'down_proj': 'experts'}


class Place(NamedTuple):
  """Where A and B of a matrix lie, in a file and in our tree.

  stem: of the names in the file. path: of our adapter, lead: its index there;
  leaves: (our leaf, its row of the table).
  """

  stem: str
  path: tuple[str, ...]
  lead: tuple
  leaves: list


def places(model: ModelConfig) -> list[Place]:
  """Returns the places of all adapters of a model.

  Raises:
    ConfigError: a target that the model does not have.
  """
  fused = dataclasses.replace(model.release, experts='fused')
  adapted, by_key = lora.targets(model), {}
  for row in names.rows(dataclasses.replace(model, release=fused)):
    matrix = _matrix(row)
    if matrix not in adapted or row.path[1].startswith('mtp_'):
      continue
    own = matrix.rpartition('.')[2]
    path = (*row.path[1:-1], own)
    for index in row.indices():
      is_expert = 'e' in row.ours
      if is_expert and (index['e'] or index.get('g')):
        continue  # a tensor of all experts is one place
      stem = row.tensor(index).removesuffix('.weight')
      if is_expert:
        stem = stem.replace(f'experts.{own}', _EXPERTS[own])
      lead = (index['l'],) if 'l' in row.ours else ()
      key = stem, path, lead
      by_key.setdefault(key, []).append((row.path[-1], row))
  return [Place(*key, leaves) for key, leaves in by_key.items()]


def _matrix(row: names.Row) -> str | None:
  """Returns the name of a row's adapter as `lora.targets` has it."""
  for name, leaves in lora.MATRICES.items():
    if row.path[-1] in leaves and row.path[0] == 'params':
      return f'experts.{name}' if 'e' in row.ours else name
  return None


def export(
  folder: pathlib.Path, model: ModelConfig, params: PyTree, base: str
) -> None:
  """Writes a model's adapters, and their config; `base` is named in it.

  Raises:
    ConfigError: adapters that all experts share.
  """
  check(model)
  tensors = {}
  for place in places(model):
    own = _at(params, place.path)
    rank = model.lora.rank
    a = np.asarray(own['a'][place.lead])
    is_expert = any('e' in row.ours for _, row in place.leaves)
    if is_expert:
      a = a.swapaxes(1, 2).reshape(-1, a.shape[1])
    else:
      a = a.T
    b = _b(own, place, rank) * np.float32(model.lora.plus)
    if is_expert:
      b = b.transpose(1, 2, 0).reshape(b.shape[1], -1)
    for part, x in (('A', a), ('B', b)):
      name = f'base_model.model.{place.stem}.lora_{part}.weight'
      tensors[name] = np.ascontiguousarray(x, np.float32)
  folder.mkdir(parents=True, exist_ok=True)
  plan = {name: (x.dtype, x.shape) for name, x in tensors.items()}
  with safetensors.create(folder / WEIGHTS, plan) as arrays:
    for name, x in tensors.items():
      arrays[name][...] = x
  text = json.dumps(_config(model, base), indent=2, sort_keys=True)
  (folder / CONFIG).write_text(f'{text}\n', encoding='utf-8')


def _b(own: dict, place: Place, rank: int) -> np.ndarray:
  """Returns B [out, r] (or of all experts [E, out, r]) in a release's order."""
  out = None
  for leaf, row in place.leaves:
    row = codes.resized(row, rank)
    out = np.zeros(row.file_shape, np.float32) if out is None else out
    for part, _, block in _blocks(own[leaf], row, place):
      row.put(block, out[part])
  return out


def _blocks(b: Any, row: names.Row, place: Place) -> Iterator[tuple]:
  """Yields (part of the file's B, our block's start, the block)."""
  b = np.asarray(b)
  b = b.reshape(row.shape)
  for index in row.indices():
    if place.lead and index['l'] != place.lead[0]:
      continue
    start = row.start(index)
    sizes = (
      1 if axis in row.loop_axes else row.size(axis) for axis in row.ours
    )
    block = b[tuple(slice(s, s + n) for s, n in zip(start, sizes, strict=True))]
    yield row.within(index), start, block


def load(
  folder: pathlib.Path, model: ModelConfig
) -> tuple[ModelConfig, PyTree, str]:
  """Returns the model with the adapter's `lora`, the adapters, the base's name.

  The model's own `lora.plus` stays: a file has B plus, our leaves have B.

  Raises:
    ConfigError: an adapter of another kind, or of another model.
  """
  values = files.read_json(folder / CONFIG)
  own = dataclasses.replace(_lora(values, folder), plus=model.lora.plus)
  model = dataclasses.replace(model, lora=own)
  check(model)
  with safetensors.File(folder / WEIGHTS) as file:
    read = {name: file.read(name) for name in file.entries}
    tensors = {name: np.array(x, np.float32) for name, x in read.items()}
  fresh = functools.partial(lora.boxed, model=model)
  shapes = nn.unbox(jax.eval_shape(fresh, jax.random.key(0)))
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  known = places(model)
  stems = {f'base_model.model.{place.stem}' for place in known}
  wanted = {f'{s}.lora_{part}.weight' for s in stems for part in 'AB'}
  if wanted != tensors.keys():
    name = min(wanted ^ tensors.keys())
    verb = 'lacks' if name in wanted else 'has'
    raise ConfigError(
      f'{folder}: {verb} {name}, unlike the config it goes with'
    )
  for place in known:
    _fill(params, place, tensors, model.lora, folder)
  return model, params, values.get('base_model_name_or_path') or ''


def base_of(folder: pathlib.Path) -> str:
  """Returns the base that adapter_config.json names; '' if it names none.

  Raises:
    ConfigError: another kind of adapter.
  """
  values = files.read_json(folder / CONFIG)
  _lora(values, folder)
  return str(values.get('base_model_name_or_path') or '')


def _fill(params, place, tensors, adapters: LoRAConfig, folder) -> None:
  """Puts A and B of one place into the tree."""
  own, rank = _at(params, place.path), adapters.rank
  stem = f'base_model.model.{place.stem}.lora'
  a, b = (tensors[f'{stem}_{part}.weight'] for part in 'AB')
  target = own['a'][place.lead]
  is_expert = any('e' in row.ours for _, row in place.leaves)
  experts = len(target) if is_expert else 1
  columns = experts * rank
  outputs = sum(own[x][place.lead].size for x, _ in place.leaves) // columns
  shapes = (columns, target.shape[-2]), (outputs, columns)
  if (a.shape, b.shape) != shapes:
    raise ConfigError(
      f'{folder}: {place.stem} has A {list(a.shape)} and B {list(b.shape)}, '
      'which are of another model'
    )
  if is_expert:
    target[...] = a.reshape(experts, rank, -1).swapaxes(1, 2)
    b = b.reshape(len(b), rank, experts).transpose(2, 0, 1)
  else:
    target[...] = a.T
  b = b / np.float32(adapters.plus)
  for leaf, row in place.leaves:
    row = codes.resized(row, rank)
    whole = own[leaf]
    ours = whole.reshape(row.shape)  # a view
    for part, start, _ in _blocks(whole, row, place):
      block = row.take(b[part])
      ends = zip(start, block.shape, strict=True)
      ours[tuple(slice(s, s + n) for s, n in ends)] = block


def _at(tree: PyTree, path: tuple[str, ...]) -> dict:
  for key in path:
    tree = tree[key]
  return tree


def check(model: ModelConfig) -> None:
  """Refuses adapters that PEFT's format does not have.

  Raises:
    ConfigError: of dense and shared MLPs, or one that all experts share.
  """
  if 'gate_up_proj' in lora.targets(model):
    raise ConfigError(
      f'model.lora.targets={model.lora.targets!r}: PEFT has no adapters of the '
      'dense and shared MLPs; train attention and experts, or --merge'
    )
  if model.lora.experts == 'shared' and 'experts' in model.lora.targets:
    raise ConfigError(
      "model.lora.experts='shared': PEFT has an adapter for each expert; "
      "export a run with 'each', or merge it (--merge)"
    )


def _config(model: ModelConfig, base: str) -> dict:
  """Returns the object of adapter_config.json."""
  adapted, own = lora.targets(model), model.lora
  modules = [name for name in adapted if not name.startswith('experts.')]
  experts = [f'mlp.{name}' for name in adapted - {*modules}]
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'r': own.rank,
    'lora_alpha': own.alpha,
    'use_rslora': own.scale == 'root',
    'target_modules': sorted(modules),
    'target_parameters': sorted(experts, reverse=True),
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
  }


# Keys that change the numbers, and their values that change none.
_PLAIN = {
  # The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base, too.
  'init_lora_weights': (True, False, 'gaussian', 'eva', 'orthogonal'),
  'use_dora': (False,),
  'fan_in_fan_out': (False,),
  'bias': ('none',),
  'lora_bias': (False,),
  'modules_to_save': (None, []),
  'rank_pattern': ({}, None),
  'alpha_pattern': ({}, None),
  'layers_to_transform': (None, []),
  'exclude_modules': (None, []),
  'layer_replication': (None, []),
  'trainable_token_indices': (None, []),
  'alora_invocation_tokens': (None, []),
  'arrow_config': (None,),
  'kasa_config': (None,),
  'monteclora_config': (None,),
  'velora_config': (None,),
  'use_bdlora': (None, False),
  'use_qalora': (None, False),
}


def _lora(values: dict, folder: pathlib.Path) -> LoRAConfig:
  """Returns the LoRAConfig of adapter_config.json.

  Raises:
    ConfigError: another kind of adapter, or targets that are no group here.
  """
  if values.get('peft_type') != 'LORA':
    raise ConfigError(
      f'{folder}: peft_type is {values.get("peft_type")!r}, not LORA'
    )
  for key, plain in _PLAIN.items():
    if key in values and values[key] not in plain:
      raise ConfigError(f'{folder}: {key}={values[key]!r} is not computed here')
  lists = [values.get(f'target_{x}') or [] for x in ('modules', 'parameters')]
  for kind, own in zip(('modules', 'parameters'), lists, strict=True):
    if not isinstance(own, list) or not all(isinstance(x, str) for x in own):
      raise ConfigError(f'{folder}: target_{kind}={own!r} is no list of names')
  modules, parameters = lists
  both = {name.rpartition('.')[2] for name in parameters}
  if both not in (set(), {'gate_up_proj', 'down_proj'}):
    raise ConfigError(
      f'{folder}: target_parameters={parameters!r} are not both of experts'
    )
  rank = values.get('r', 8)
  if not isinstance(rank, int) or rank < 1:
    raise ConfigError(f'{folder}: r={rank!r} is no rank')
  return LoRAConfig(
    rank=rank,
    alpha=values.get('lora_alpha', 8),
    scale='root' if values.get('use_rslora') else 'rank',
    targets=(*sorted(modules), *['experts'] * bool(both)),
  )
