"""What a run is: frozen dataclasses, whose defaults are DeepSeek-V3's.

`Config(model, optim, data, mesh, run)` holds every number that a run depends
on; nothing else does. The classes check themselves when they are built, so a
`Config` that exists is a valid one, and every complaint is one line with the
value, the rule and the fix. At the edge (command line, config files, JSON) a
config is a `ConfigDict`, which people may override key by key; `freeze` turns
it into the checked dataclass and `thaw` back.

No field is optional: 0 switches a thing off. Numbers are never negative.
Sources of the defaults: DeepSeek-V3 report, sections 4.1 to 4.3, and the
released config.json.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator
from typing import Any

import ml_collections


class ConfigError(ValueError):
  """A configuration that cannot be run; the message is one line for people."""


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _coerce(name: str, value: Any, kind: Any) -> Any:
  """`value` as `kind`, or a ConfigError; ints stand for floats, never bools."""
  if kind is float and _is_number(value):
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


def _divides(part_name: str, part: int, whole_name: str, whole: int):
  if whole % part:
    raise ConfigError(f'{part_name}={part}: must divide {whole_name}={whole}')


@dataclasses.dataclass(frozen=True)
class _Checked:
  """Checks every field's type when built; subclasses add `_rules`."""

  def __post_init__(self):
    hints = typing.get_type_hints(type(self))
    for field in dataclasses.fields(self):
      value = _coerce(field.name, getattr(self, field.name), hints[field.name])
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

  def _one_of(self, name: str, *choices: str):
    value = getattr(self, name)
    self._require(
      name, value in choices, f'must be one of {", ".join(choices)}'
    )


@dataclasses.dataclass(frozen=True)
class RopeConfig(_Checked):
  """Rotary positions; YaRN when `factor` > 1 (V3 section 4.3).

  `original_positions` is the length that the model was first trained at.
  """

  theta: float = 10000.0
  factor: float = 1.0
  original_positions: int = 0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 1.0

  def _rules(self):
    self._require('theta', self.theta > 1, 'must be above 1')
    self._require(
      'factor', self.factor >= 1, 'must be 1 (no YaRN) or the extension factor'
    )
    if self.factor > 1:
      self._require(
        'original_positions',
        self.original_positions > 0,
        f'YaRN (factor={self.factor:g}) needs the length of the first training',
      )
      self._require(
        'beta_slow',
        0 < self.beta_slow <= self.beta_fast,
        f'YaRN needs 0 < beta_slow <= beta_fast={self.beta_fast:g}',
      )


@dataclasses.dataclass(frozen=True)
class MLAConfig(_Checked):
  """Multi-head Latent Attention; `query_rank` 0 is an uncompressed query.

  `impl` names the attention core; 'auto' takes the platform's
  (`attention.attend`). The latents have norms of their own, whose epsilon is
  1e-6 in every released model whatever the others' is.
  """

  heads: int = 128
  query_rank: int = 1536
  kv_rank: int = 512
  nope_dim: int = 128
  rope_dim: int = 64
  value_dim: int = 128
  norm_eps: float = 1e-6
  rope: RopeConfig = RopeConfig()
  impl: str = 'auto'

  def _rules(self):
    self._positive('heads', 'kv_rank', 'nope_dim', 'rope_dim', 'value_dim')
    self._require(
      'rope_dim', self.rope_dim % 2 == 0, 'must be even: it rotates pairs'
    )
    self._one_of(
      'impl', 'auto', 'reference', 'xla', 'splash', 'cudnn', 'tokamax'
    )


@dataclasses.dataclass(frozen=True)
class MoEConfig(_Checked):
  """Fine-grained experts and their router (V3 section 2.1.2).

  `method` is the released name of the selection rule: `noaux_tc` adds the
  balancing bias and scores a group by its two best experts,
  `group_limited_greedy` (V2) has no bias and scores it by its best, `greedy`
  has neither bias nor groups. `scale` multiplies the routed sum, after
  normalisation. `impl` names the grouped computation; 'auto' takes the
  platform's (`moe.experts`). `exchange` names how tokens reach the experts of
  other devices (`expert_parallel`); 'auto' goes by their number and platform.
  """

  experts: int = 256
  top_k: int = 8
  shared: int = 1
  width: int = 2048
  groups: int = 8
  top_groups: int = 4
  scoring: str = 'sigmoid'
  method: str = 'noaux_tc'
  normalize: bool = True
  scale: float = 2.5
  impl: str = 'auto'
  exchange: str = 'auto'

  def _rules(self):
    self._positive('experts', 'top_k', 'width', 'groups', 'top_groups')
    self._one_of('scoring', 'sigmoid', 'softmax')
    self._one_of('method', 'noaux_tc', 'group_limited_greedy', 'greedy')
    self._one_of('impl', 'auto', 'loop', 'ragged', 'padded', 'dense')
    self._one_of('exchange', 'auto', 'gather', 'padded', 'ragged')
    self._require('scale', self.scale > 0, 'must be above 0')
    self._require(
      'groups',
      self.experts % self.groups == 0,
      f'must divide experts={self.experts}',
    )
    self._require(
      'groups',
      self.groups == 1 or self.method != 'greedy',
      "method 'greedy' has no groups; set groups=1 or another method",
    )
    self._require(
      'top_groups',
      self.top_groups <= self.groups,
      f'must not exceed groups={self.groups}',
    )
    size = self.experts // self.groups
    self._require(
      'groups',
      self.method != 'noaux_tc' or self.groups == 1 or size >= 2,
      f'noaux_tc scores a group by two experts, but groups hold {size}',
    )
    left = self.top_groups * size
    self._require(
      'top_k',
      self.top_k <= left,
      f'top_groups={self.top_groups} of groups={self.groups} leave {left} of '
      f'experts={self.experts}; lower top_k or raise top_groups',
    )


@dataclasses.dataclass(frozen=True)
class MTPConfig(_Checked):
  """Multi-token prediction: `depth` modules, each a block (V3 2.2)."""

  depth: int = 1


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Checked):
  """The network: the first `dense_layers` have a dense FFN, the rest experts.

  `dtype` is the activations'; parameters are float32. `remat` says what the
  backward pass has kept: 'products' (of weights; what is made from them
  element by element is made again), 'latents' (the attention's latents and its
  output: V3 section 3.2.3), nothing but the residual stream under 'full', or
  everything under 'none'. `precision` is that of the linear
  layers' products, in all three of training; `fp8_impl` names what computes
  them ('auto': the hardware's, see `fp8.gemm`).
  """

  vocab: int = 129280
  dim: int = 7168
  layers: int = 61
  dense_layers: int = 3
  dense_width: int = 18432
  norm_eps: float = 1e-6
  max_positions: int = 163840
  tie_embeddings: bool = False
  init_std: float = 0.006
  bos_id: int = 0
  eos_id: int = 1
  dtype: str = 'bfloat16'
  precision: str = 'bf16'
  fp8_impl: str = 'auto'
  remat: str = 'latents'
  mla: MLAConfig = MLAConfig()
  moe: MoEConfig = MoEConfig()
  mtp: MTPConfig = MTPConfig()

  @property
  def moe_layers(self) -> int:
    return self.layers - self.dense_layers

  def _rules(self):
    self._positive('vocab', 'dim', 'layers', 'dense_width', 'max_positions')
    self._require('init_std', self.init_std > 0, 'must be above 0')
    self._require('norm_eps', self.norm_eps > 0, 'must be above 0')
    self._one_of('dtype', 'float32', 'bfloat16')
    self._one_of('precision', 'bf16', 'fp8_tensor', 'fp8_channel', 'fp8_block')
    self._one_of(
      'fp8_impl', 'auto', 'dequant', 'native', 'mgpu', 'tpu', 'mxfp8'
    )
    fitting = {
      'bf16': ('auto',),
      'fp8_block': ('auto', 'dequant', 'mgpu', 'tpu', 'mxfp8'),
    }.get(self.precision, ('auto', 'dequant', 'native'))
    self._require(
      'fp8_impl',
      self.fp8_impl in fitting,
      f'precision={self.precision!r} can be {", ".join(fitting)}',
    )
    self._require(
      'precision',
      self.precision == 'bf16' or self.moe.impl in ('auto', 'loop', 'ragged'),
      f'FP8 experts are not moe.impl={self.moe.impl!r} but auto, loop or '
      'ragged',
    )
    self._one_of('remat', 'none', 'products', 'latents', 'full')
    self._require(
      'dense_layers',
      self.dense_layers <= self.layers,
      f'must not exceed layers={self.layers}',
    )
    for name in ('bos_id', 'eos_id'):
      self._require(
        name,
        getattr(self, name) < self.vocab,
        f'must be below vocab={self.vocab}',
      )


@dataclasses.dataclass(frozen=True)
class CacheConfig(_Checked):
  """How decoding keeps the latents: their type, and tokens in a page.

  'auto' is float32 on a CPU and bfloat16 elsewhere; 'int8' and 'float8' (E4M3)
  have a scale for each 128 numbers and keep the shared key in bfloat16. `impl`
  is what attends to it one token at a time: 'xla' anywhere, the kernel 'tpu'
  (which 'auto' takes on a TPU) or 'gpu', which read unquantised latents.
  """

  dtype: str = 'auto'
  page: int = 128
  impl: str = 'auto'

  def _rules(self):
    self._positive('page')
    self._one_of('dtype', 'auto', 'float32', 'bfloat16', 'int8', 'float8')
    self._one_of('impl', 'auto', 'xla', 'tpu', 'gpu')
    self._require(
      'impl',
      self.impl in ('auto', 'xla') or self.dtype not in ('int8', 'float8'),
      f"the kernels read no {self.dtype} latents; use 'xla'",
    )
    self._require(
      'page',
      self.impl != 'tpu' or self.page % 128 == 0,
      "impl='tpu' reads pages of multiples of 128",
    )


@dataclasses.dataclass(frozen=True)
class OptimConfig(_Checked):
  """The training recipe: optimizer, schedules keyed on tokens, loss weights.

  The learning rate rises linearly over `warmup_steps`, then follows `phases`:
  each is (shape, tokens, target), shape one of constant, linear, cosine; target
  is the rate at the phase's end as a share of `learning_rate`. The last phase's
  end holds for ever. The bias rate (gamma) and the MTP weight (lambda) change
  once, after `bias_tokens` and `mtp_tokens`.

  A step whose loss or gradient is not finite changes nothing; nor does one
  whose loss exceeds the mean of the last `spike_window` accepted losses by more
  than `spike_sigma` standard deviations (0: none is looked for).
  """

  optimizer: str = 'adamw'
  learning_rate: float = 2.2e-4
  warmup_steps: int = 2000
  phases: tuple = (
    ('constant', 10e12, 1.0),
    ('cosine', 4.3e12, 0.1),
    ('constant', 333e9, 0.1),
    ('constant', 167e9, 7.3e-6 / 2.2e-4),
  )
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip: float = 1.0
  z_loss: float = 0.0
  balance_loss: float = 1e-4
  bias_rate: float = 1e-3
  bias_rate_final: float = 0.0
  bias_tokens: float = 14.3e12
  mtp_loss: float = 0.3
  mtp_loss_final: float = 0.1
  mtp_tokens: float = 10e12
  spike_sigma: float = 0.0
  spike_window: int = 128

  def _rules(self):
    self._require('spike_window', self.spike_window > 1, 'must be at least 2')
    self._one_of('optimizer', 'adamw', 'muon')
    for name in ('beta1', 'beta2'):
      self._require(name, getattr(self, name) < 1, 'must be below 1')
    self._require('eps', self.eps > 0, 'must be above 0')
    self._require('clip', self.clip > 0, 'must be above 0')
    self._require('phases', len(self.phases) > 0, 'needs at least one phase')
    for phase in self.phases:
      good = (
        isinstance(phase, tuple)
        and len(phase) == 3
        and phase[0] in ('constant', 'linear', 'cosine')
        and all(_is_number(x) and x >= 0 for x in phase[1:])
      )
      self._require(
        'phases',
        good,
        'each is (constant|linear|cosine, tokens, share of the rate)',
      )


@dataclasses.dataclass(frozen=True)
class DataConfig(_Checked):
  """Where tokens come from and how many make a step.

  `source` is 'stdlib' (the source files of Python's standard library: real
  text that is always there), or a folder, glob or file of .txt, .jsonl or
  .parquet. `tokenizer` is 'byte' or the path of a tokenizer.json. A step has
  `batch_size` sequences, taken `micro_batch` at a time (0: all at once); it
  grows from `batch_start` (0: no ramp) over `ramp_tokens`. `packing` is
  'joined' (documents follow each other and see each other, as V3 pre-trained)
  or 'separate' (attention and positions end with the document).
  """

  source: str = 'stdlib'
  tokenizer: str = 'byte'
  loader: str = 'memmap'
  packing: str = 'joined'
  seq_len: int = 4096
  batch_size: int = 15360
  batch_start: int = 0
  ramp_tokens: float = 0.0
  micro_batch: int = 0
  fim_rate: float = 0.1
  heldout: float = 0.02
  seed: int = 0

  def _rules(self):
    self._positive('batch_size')
    self._require('seq_len', self.seq_len > 1, 'must be at least 2')
    self._require('source', self.source != '', "must be 'stdlib' or a path")
    self._require('tokenizer', self.tokenizer != '', "must be 'byte' or a path")
    self._one_of('loader', 'memmap', 'grain')
    self._one_of('packing', 'joined', 'separate')
    self._require('fim_rate', self.fim_rate <= 1, 'is a probability')
    self._require('heldout', 0 < self.heldout < 1, 'must be between 0 and 1')
    micro = self.micro_batch or self.batch_size
    self._require(
      'micro_batch',
      self.batch_size % micro == 0,
      f'must divide batch_size={self.batch_size}',
    )
    self._require(
      'batch_start',
      self.batch_start <= self.batch_size and self.batch_start % micro == 0,
      f'must be a multiple of micro_batch={micro} up to '
      f'batch_size={self.batch_size}',
    )
    self._require(
      'ramp_tokens',
      (self.ramp_tokens > 0) == (self.batch_start > 0),
      f'belongs to batch_start={self.batch_start}: set both or neither',
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Checked):
  """Devices along each axis of the mesh; the product is their number.

  `states` says where the optimizer's state lives: 'fsdp' with its parameters,
  'zero1' also split over `data`, where parameters are whole. A pipeline of
  `stage` stages takes `pipeline` micro-batches at a time (0: one a stage).
  """

  data: int = 1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  context: int = 1
  stage: int = 1
  states: str = 'fsdp'
  pipeline: int = 0

  @property
  def devices(self) -> int:
    return math.prod(
      (self.data, self.fsdp, self.expert)
      + (self.tensor, self.context, self.stage)
    )

  def _rules(self):
    self._positive('data', 'fsdp', 'expert', 'tensor', 'context', 'stage')
    self._one_of('states', 'fsdp', 'zero1')


@dataclasses.dataclass(frozen=True)
class RunConfig(_Checked):
  """The loop: how long, how often it speaks, saves and evaluates (0: never).

  Kept are the newest `keep` checkpoints, every step that `keep_every` divides,
  and the `keep_best` ones of the lowest held-out bits per byte. Every
  `check_every` steps the state's fingerprints are written down, and replicas
  compared. A step that takes `step_timeout` seconds ends the run. FP8's health
  is measured every `health_every` steps, where the model has FP8 products.

  After `max_skips` skipped steps in a row the run stops. After `spike_patience`
  of them that were spikes it goes back to the checkpoint before the first and
  continues with the text `spike_jump` batches further on (PaLM, section 5.1),
  at most `max_rollbacks` times.
  """

  steps: int = 243425
  seed: int = 0
  log_every: int = 10
  eval_every: int = 1000
  eval_batches: int = 16
  sample_every: int = 1000
  health_every: int = 100
  save_every: int = 1000
  keep: int = 3
  keep_every: int = 0
  keep_best: int = 0
  check_every: int = 100
  step_timeout: float = 1800.0
  max_skips: int = 5
  spike_patience: int = 3
  spike_jump: int = 200
  max_rollbacks: int = 3

  def _rules(self):
    self._positive('steps', 'log_every', 'eval_batches', 'keep')
    self._positive('max_skips', 'spike_patience')


@dataclasses.dataclass(frozen=True)
class Config(_Checked):
  """One run."""

  model: ModelConfig = ModelConfig()
  optim: OptimConfig = OptimConfig()
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  run: RunConfig = RunConfig()

  def _rules(self):
    model, data, mesh = self.model, self.data, self.mesh
    _divides('mesh.tensor', mesh.tensor, 'model.mla.heads', model.mla.heads)
    _divides('mesh.expert', mesh.expert, 'model.moe.experts', model.moe.experts)
    shards = mesh.data * mesh.fsdp * mesh.expert * mesh.stage
    micro = data.micro_batch or data.batch_size
    _divides(
      'mesh.data * fsdp * expert * stage', shards, 'data.micro_batch', micro
    )
    turns = shards // mesh.stage * (mesh.pipeline or 1)
    _divides('mesh.data * fsdp * expert * pipeline', turns, 'the batch', micro)
    _divides('mesh.context', mesh.context, 'data.seq_len', data.seq_len)
    _divides(
      'mesh.stage', mesh.stage, 'the number of MoE layers', model.moe_layers
    )
    if data.seq_len > model.max_positions:
      raise ConfigError(
        f'data.seq_len={data.seq_len}: the model has '
        f'model.max_positions={model.max_positions}; shorten the sequences or '
        'extend the positions'
      )
    if model.mtp.depth >= data.seq_len - 1:
      raise ConfigError(
        f'model.mtp.depth={model.mtp.depth}: data.seq_len={data.seq_len} '
        'leaves nothing to predict'
      )


def thaw(config: Any) -> ml_collections.ConfigDict:
  """The config as a ConfigDict, which the command line may override."""
  values = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    nested = dataclasses.is_dataclass(value)
    values[field.name] = thaw(value) if nested else value
  return ml_collections.ConfigDict(values)


def freeze(values: Any, cls: type = Config, path: str = 'config') -> Any:
  """The checked dataclass of a ConfigDict (or of a dict read from JSON).

  Raises:
    ConfigError: an unknown key (with the nearest name), a wrong type, a value
      that breaks a rule. The message starts with the key's whole path.
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
      freeze(value, hints[name], f'{path}.{name}') if nested else value
    )
  try:
    return cls(**kwargs)
  except ConfigError as error:
    raise ConfigError(f'{path}.{error}') from None


def keys(cls: type = Config, path: str = 'config') -> Iterator[str]:
  """Every key's whole path, as the command line has it after its dashes."""
  for name, hint in typing.get_type_hints(cls).items():
    here = f'{path}.{name}'
    if dataclasses.is_dataclass(hint):
      yield from keys(hint, here)
    else:
      yield here


def differences(ours: Any, theirs: Any, path: str = 'config') -> list[str]:
  """The fields in which two configs of one class differ, as 'path: a != b'."""
  lines = []
  for field in dataclasses.fields(ours):
    a, b = getattr(ours, field.name), getattr(theirs, field.name)
    here = f'{path}.{field.name}'
    if dataclasses.is_dataclass(a):
      lines += differences(a, b, here)
    elif a != b:
      lines.append(f'{here}: {a!r} != {b!r}')
  return lines


def variant(config: Config, arg: str, **named: Config) -> Config:
  """The config of `--config=FILE:arg`; parts of `arg` are joined by commas.

  Every file has 'smoke' (toy size, same code); `named` are its others, whole
  configs. The empty arg is `config`.

  Raises:
    ConfigError: a part that is not there.
  """
  parts = [part for part in arg.split(',') if part]
  for part in parts:
    if part != 'smoke' and part not in named:
      known = ', '.join([*named, 'smoke'])
      raise ConfigError(f'variant {part!r}: there is only {known}')
    config = named.get(part, config)
  return smoke(config) if 'smoke' in parts else config


def smoke(config: Config) -> Config:
  """The same code paths at toy size: 20 steps, under a minute on a CPU."""
  model, moe = config.model, config.model.moe
  experts = 4 * moe.groups
  small_moe = dataclasses.replace(
    moe,
    experts=max(experts, 8),
    top_k=min(moe.top_k, 4),
    width=32,
  )
  small_mla = dataclasses.replace(
    model.mla,
    heads=4,
    query_rank=min(model.mla.query_rank, 48),
    kv_rank=32,
    nope_dim=16,
    rope_dim=8,
    value_dim=16,
  )
  small_model = dataclasses.replace(
    model,
    vocab=max(264, min(model.vocab, 512)),
    dim=64,
    dense_layers=min(model.dense_layers, 1),
    layers=min(model.dense_layers, 1) + 2,
    dense_width=128,
    bos_id=256,
    eos_id=257,
    mla=small_mla,
    moe=small_moe,
  )
  data = dataclasses.replace(
    config.data,
    seq_len=128,
    batch_size=8,
    batch_start=0,
    ramp_tokens=0.0,
    micro_batch=4 if config.data.micro_batch else 0,
    tokenizer='byte',
  )
  run = dataclasses.replace(
    config.run,
    steps=20,
    log_every=1,
    eval_every=10,
    eval_batches=2,
    sample_every=10,
    health_every=0,  # a program of its own to compile
    save_every=10,
    check_every=5,
  )
  optim = dataclasses.replace(config.optim, warmup_steps=5)
  return dataclasses.replace(
    config, model=small_model, data=data, run=run, optim=optim
  )
