"""Every number that a run depends on, as frozen dataclasses.

`Config(model, optim, data, mesh, run)` is a whole run; the defaults are those
of DeepSeek-V3 (report, sections 4.1 to 4.3, and the released config.json). The
classes check themselves when they are built, so a `Config` that exists is
valid, and an error is one line with the value, the rule and the fix. At the
edge (command line, config files, JSON) a config is a `ConfigDict`, which people
override key by key; `freeze` turns it into the checked dataclass, `thaw` back.

No field is optional: 0 switches a feature off. Numbers are never negative, but
for an id of -1: it is the tokenizer's, and `freeze` puts the number there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from mla_moe import checked, vocabulary
from mla_moe.checked import Checked, ConfigError, check_divides, is_row
from mla_moe.checked import thaw as thaw
from mla_moe.data_config import DataConfig as DataConfig
from mla_moe.dsa_config import DSAConfig as DSAConfig
from mla_moe.rl_config import RLConfig as RLConfig
from mla_moe.run_config import RunConfig as RunConfig
from mla_moe.use_config import CacheConfig as CacheConfig
from mla_moe.use_config import LoRAConfig as LoRAConfig
from mla_moe.use_config import ReleaseConfig as ReleaseConfig


@dataclasses.dataclass(frozen=True)
class RopeConfig(Checked):
  """Rotary positions; YaRN when `factor` > 1 (V3 section 4.3).

  `original_positions` is the sequence length of the training before YaRN. With
  `query_beta` queries grow each `query_positions` tokens. See `model.rope`.
  """

  theta: float = 10000.0
  factor: float = 1.0
  original_positions: int = 0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 1.0
  query_beta: float = 0.0
  query_positions: int = 0

  def _rules(self):
    self._require('theta', self.theta > 1, 'must be above 1')
    both = (self.query_positions > 0) == (self.query_beta > 0)
    rule = f'belongs to query_beta={self.query_beta:g}: set both or neither'
    self._require('query_positions', both, rule)
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
class MLAConfig(Checked):
  """Multi-head Latent Attention; `query_rank` 0 is a query without a latent.

  `norm_eps` is that of the latents' norms: 1e-6 in every released model, also
  where the other norms have another.
  """

  heads: int = 128
  query_rank: int = 1536
  kv_rank: int = 512
  nope_dim: int = 128
  rope_dim: int = 64
  value_dim: int = 128
  norm_eps: float = 1e-6
  rope: RopeConfig = RopeConfig()

  def _rules(self):
    self._positive('heads', 'kv_rank', 'rope_dim', 'value_dim')
    self._require(
      'rope_dim', self.rope_dim % 2 == 0, 'must be even: it rotates pairs'
    )


@dataclasses.dataclass(frozen=True)
class MoEConfig(Checked):
  """Fine-grained experts and their router (V3 section 2.1.2).

  `experts` of hidden width `width` form `groups`; a token's `top_k` experts are
  in its `top_groups` best groups. `shared` experts see every token. `method` is
  the released name of the selection rule: `noaux_tc` adds the balancing bias
  and scores a group by its two best experts, `group_top2` (Mistral) has no bias
  but the same score, `group_limited_greedy` (V2) takes a group's best alone,
  `greedy` has neither bias nor groups.
  `normalize` makes a token's gates sum to 1; `scale` then multiplies them.
  """

  experts: int = 256
  top_k: int = 8
  shared: int = 1
  width: int = 2048
  groups: int = 8
  top_groups: int = 4
  scoring: Literal['sigmoid', 'softmax'] = 'sigmoid'
  method: Literal[
    'noaux_tc', 'group_top2', 'group_limited_greedy', 'greedy'
  ] = 'noaux_tc'
  normalize: bool = True
  scale: float = 2.5

  def _rules(self):
    self._positive('experts', 'top_k', 'width', 'groups', 'top_groups')
    self._require('scale', self.scale > 0, 'must be above 0')
    self._require(
      'normalize',
      not self.normalize or self.top_k > 1,
      'with top_k=1 each gate is s / s = 1, and the router gets no gradient; '
      'set normalize=False or raise top_k',
    )
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
      'greedy' in self.method or self.groups == 1 or size >= 2,
      f'{self.method} scores a group by two experts, but groups hold {size}',
    )
    eligible = self.top_groups * size
    self._require(
      'top_k',
      self.top_k <= eligible,
      f'top_groups={self.top_groups} of groups={self.groups} leave {eligible} '
      f'of experts={self.experts}; lower top_k or raise top_groups',
    )


@dataclasses.dataclass(frozen=True)
class MTPConfig(Checked):
  """Multi-token prediction by `depth` modules (V3 section 2.2)."""

  depth: int = 1


# The implementations (`fp8.gemm`) that compute each precision on some hardware;
# 'auto', which fits them all, takes the platform's.
FP8_IMPLS = {
  'bf16': (),
  'fp8_tensor': ('dequant', 'native'),
  'fp8_channel': ('dequant', 'native'),
  'fp8_block': ('dequant', 'mgpu', 'tpu', 'mxfp8'),
}


@dataclasses.dataclass(frozen=True)
class ComputeConfig(Checked):
  """How a model is computed; no field changes the model or its training.

  A run resumes with another value of any of these, with the same losses but
  for their last digits. `remat` names the values that the backward pass finds
  saved; it computes all others again. 'none' saves everything, 'products' the
  products with weights, 'latents' the attention's latents and its output (V3
  section 3.2.3), 'full' the residual stream alone. The other fields name
  implementations, of which 'auto' takes the platform's: `attention` of the core
  (`attention.attend`), `experts` of the grouped product
  (`experts.feed_forward`), `exchange` of the way to experts on other devices
  (`model.exchange`), `fp8` of the FP8 product (`fp8.gemm`).
  """

  remat: Literal['none', 'products', 'latents', 'full'] = 'latents'
  attention: Literal['auto', 'reference', 'xla', 'splash', 'cudnn'] = 'auto'
  experts: Literal['auto', 'loop', 'ragged', 'padded', 'dense'] = 'auto'
  exchange: Literal['auto', 'gather', 'padded', 'ragged'] = 'auto'
  fp8: Literal['auto', 'dequant', 'native', 'mgpu', 'tpu', 'mxfp8'] = 'auto'


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
  """The network: `dense_layers` with a dense FFN, then layers with experts.

  `attention` 'gqa' has `kv_heads` of keys and values, and `mla`'s other sizes.
  `vocab` 0 is the tokenizer's size, a multiple of 8; `bos_id` and `eos_id` -1
  are its tokens. `dtype` is that of activations; parameters are float32.
  `precision` is that of the linear layers' products (`fp8`): output and both
  gradients. 'bf16' means products in `dtype`. `base`, `lora`: docs/lora.md.
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
  bos_id: int = dataclasses.field(default=-1, metadata={'least': -1})
  eos_id: int = dataclasses.field(default=-1, metadata={'least': -1})
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  attention: Literal['mla', 'gqa'] = 'mla'
  kv_heads: int = 0
  precision: Literal['bf16', 'fp8_tensor', 'fp8_channel', 'fp8_block'] = 'bf16'
  base: Literal['trained', 'fp8', 'int8', 'int4'] = 'trained'
  lora: LoRAConfig = LoRAConfig()
  compute: ComputeConfig = ComputeConfig()
  mla: MLAConfig = MLAConfig()
  dsa: DSAConfig = DSAConfig()
  moe: MoEConfig = MoEConfig()
  mtp: MTPConfig = MTPConfig()
  release: ReleaseConfig = ReleaseConfig()

  @property
  def moe_layers(self) -> int:
    return self.layers - self.dense_layers

  def _rules(self):
    self._positive('dim', 'layers', 'dense_width', 'max_positions')
    self._require('init_std', self.init_std > 0, 'must be above 0')
    self._require('norm_eps', self.norm_eps > 0, 'must be above 0')
    fp8, experts = self.compute.fp8, self.compute.experts
    fitting = ('auto', *FP8_IMPLS[self.precision])
    self._require(
      'precision',
      fp8 in fitting,
      f'compute.fp8={fp8!r} does not fit it; it can be {", ".join(fitting)}',
    )
    self._require(
      'precision',
      self.precision == 'bf16' or experts in ('auto', 'loop', 'ragged'),
      f'FP8 experts are not compute.experts={experts!r} but auto, loop or '
      'ragged',
    )
    self._require(
      'dense_layers',
      self.dense_layers <= self.layers,
      f'must not exceed layers={self.layers}',
    )
    self._check_attention()
    self.dsa.check(self)
    for name in ('bos_id', 'eos_id'):
      self._require(
        name,
        not self.vocab or getattr(self, name) < self.vocab,
        f'must be below vocab={self.vocab}',
      )

  def _check_attention(self):
    mla, n, wrong = self.mla, self.kv_heads, ''
    if self.attention == 'mla':
      if n or not mla.nope_dim:
        wrong = f'kv_heads={n}, {mla.nope_dim=}: of MLA are 0 and at least 1'
    elif not n or mla.heads % n:
      wrong = f'kv_heads={n}: must be at least 1 and divide {mla.heads=}'
    elif mla.query_rank or self.dsa.heads or self.lora.rank:
      wrong = f'{mla.query_rank=}, dsa.heads={self.dsa.heads}, '
      wrong += f'lora.rank={self.lora.rank}: no parts of GQA; set them to 0'
    elif self.base != 'trained':
      wrong = f'base={self.base!r}: codes of a release, of which GQA has none'
    if wrong:
      raise ConfigError(f'attention={self.attention!r}: {wrong}')


@dataclasses.dataclass(frozen=True)
class OptimConfig(Checked):
  """The training recipe: optimizer, schedules keyed on tokens, loss weights.

  The learning rate rises linearly over `warmup_steps`, then follows `phases`.
  A phase is (shape, tokens, target): the shape is constant, linear or cosine,
  the target is the rate at the phase's end, relative to `learning_rate`. After
  the last phase the rate stays at its target. The bias rate (gamma) and the MTP
  weight (lambda) change once, after `bias_tokens` and `mtp_tokens`, to their
  `_final` values.

  A step is skipped if its loss or gradient is not finite, or if its main loss
  exceeds the mean of the last `spike_window` accepted ones by more than
  `spike_sigma` standard deviations (0: no spike is skipped). `trains` 'indexer'
  freezes all but the indexers, whose loss has the weight `index_loss`.
  """

  optimizer: Literal['adamw', 'muon'] = 'adamw'
  trains: Literal['all', 'indexer'] = 'all'
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
  index_loss: float = 1.0
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
    for name in ('beta1', 'beta2'):
      self._require(name, getattr(self, name) < 1, 'must be below 1')
    self._require('eps', self.eps > 0, 'must be above 0')
    self._require('clip', self.clip > 0, 'must be above 0')
    self._require('phases', len(self.phases) > 0, 'needs at least one phase')
    for phase in self.phases:
      self._require(
        'phases',
        is_row(phase, str, float, float)
        and phase[0] in ('constant', 'linear', 'cosine')
        and min(phase[1:]) >= 0,
        'each is (constant|linear|cosine, tokens, fraction of the peak rate)',
      )


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
  """Devices along each axis of the mesh; the product is their number.

  `states` is the layout of the optimizer's state: 'fsdp' is that of the
  parameters, 'zero1' splits it over `data`, too. A pipeline of `stage` stages
  computes `pipeline` micro-batches at a time (0: one a stage).
  """

  data: int = 1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  context: int = 1
  stage: int = 1
  states: Literal['fsdp', 'zero1'] = 'fsdp'
  pipeline: int = 0

  @property
  def devices(self) -> int:
    return math.prod(
      (self.data, self.fsdp, self.expert)
      + (self.tensor, self.context, self.stage)
    )

  def _rules(self):
    self._positive('data', 'fsdp', 'expert', 'tensor', 'context', 'stage')


@dataclasses.dataclass(frozen=True)
class Config(Checked):
  """One run: the model, its training, its text, its devices and its loop.

  With `rl.task` it is reinforcement learning, and the text is not read.
  """

  model: ModelConfig = ModelConfig()
  optim: OptimConfig = OptimConfig()
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  run: RunConfig = RunConfig()
  rl: RLConfig = RLConfig()

  def _rules(self):
    model, data, mesh = self.model, self.data, self.mesh
    name = 'kv_heads' if model.kv_heads else 'mla.heads'
    heads = model.kv_heads or model.mla.heads
    check_divides('mesh.tensor', mesh.tensor, f'model.{name}', heads)
    check_divides(
      'mesh.expert', mesh.expert, 'model.moe.experts', model.moe.experts
    )
    shards = mesh.data * mesh.fsdp * mesh.expert * mesh.stage
    micro = data.micro_batch or data.batch_size
    check_divides(
      'mesh.data * fsdp * expert * stage', shards, 'data.micro_batch', micro
    )
    turns = shards // mesh.stage * (mesh.pipeline or 1)
    check_divides(
      'mesh.data * fsdp * expert * pipeline', turns, 'the batch', micro
    )
    check_divides('mesh.context', mesh.context, 'data.seq_len', data.seq_len)
    check_divides(
      'mesh.stage', mesh.stage, 'the number of MoE layers', model.moe_layers
    )
    model.dsa.check_training(self.optim)
    shared = self.rl.task and self.rl.prompt == 'shared'
    if data.seq_len > model.max_positions and not shared:
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


def freeze(values: Any) -> Config:
  """Returns the checked Config of a ConfigDict or of a dict from JSON.

  It has the tokenizer's numbers where `values` leave them to the tokenizer.
  Ids may stay open where its file is on another machine.

  Raises:
    ConfigError: as `checked.freeze`, or a tokenizer without such tokens.
  """
  config = checked.freeze(checked.migrated(values), Config, 'config')
  model, name = config.model, config.data.tokenizer
  is_open = min(model.bos_id, model.eos_id) < 0
  if not model.vocab or (is_open and vocabulary.exists(name)):
    ids = vocabulary.fill(name, model.vocab, model.bos_id, model.eos_id)
    model = dataclasses.replace(model, **ids)
  return dataclasses.replace(config, model=model)
