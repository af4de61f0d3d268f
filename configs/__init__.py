"""One file a model, with get_config(arg), and the variants that all share.

A variant is named after the colon in `--config=FILE:VARIANT`; a config here is
a `mla_moe.config.Config`. Every model has the variant smoke.
"""

from __future__ import annotations

import dataclasses
import math

from ml_collections import ConfigDict, FieldReference

from mla_moe import config as c


def variant(config: c.Config, arg: str, **variants: c.Config) -> c.Config:
  """Returns the variant `arg` of a config; a comma joins several.

  Every config has 'smoke' (toy size, same code); `variants` are the others, as
  whole configs. The empty `arg` is `config` itself.

  Raises:
    ConfigError: there is no variant of that name.
  """
  parts = [part for part in arg.split(',') if part]
  for part in parts:
    if part != 'smoke' and part not in variants:
      known = ', '.join([*variants, 'smoke'])
      raise c.ConfigError(f'variant {part!r}: there is only {known}')
    config = variants.get(part, config)
  return smoke(config) if 'smoke' in parts else config


def follow_run(values: ConfigDict) -> ConfigDict:
  """Makes the schedules of `thaw`'s values follow the tokens of the run.

  An override of run.steps, data.batch_size or data.seq_len stretches warm-up,
  phases, and the tokens of bias, MTP weight and ramp. `freeze` has numbers.
  """
  run, data, optim = values.run, values.data, values.optim
  rows = run.get_ref('steps') * data.get_ref('batch_size')
  tokens = rows * data.get_ref('seq_len')
  along = lambda length: FieldReference(length) * (tokens / tokens.get())
  phases = [(kind, along(float(n)), end) for kind, n, end in optim.phases]
  optim.warmup_steps = along(optim.warmup_steps).to_int()
  data.phases = tuple((along(float(n)), weights) for n, weights in data.phases)
  optim.phases, data.ramp_tokens = tuple(phases), along(data.ramp_tokens)
  optim.bias_tokens = along(optim.bias_tokens)
  optim.mtp_tokens = along(optim.mtp_tokens)
  return values


def smoke(config: c.Config) -> c.Config:
  """Returns the config at toy size: 20 steps, under a minute on a CPU.

  The code paths stay the same: groups, biases, MTP, precision, optimizer.
  """
  model, moe = config.model, config.model.moe
  small_moe = dataclasses.replace(
    moe, experts=max(4 * moe.groups, 8), top_k=min(moe.top_k, 4), width=32
  )
  sizes = dict(heads=4, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16)
  sizes['query_rank'] = min(model.mla.query_rank, 48)
  small_mla = dataclasses.replace(model.mla, **sizes)
  dense, dsa = min(model.dense_layers, 1), model.dsa
  if dsa.heads:
    sizes = dict(heads=min(dsa.heads, 4), dim=16, topk=32)
    dsa = dataclasses.replace(dsa, types=dsa.types[: dense + 2], **sizes)
  small_model = dataclasses.replace(
    model,
    dsa=dsa,
    kv_heads=model.kv_heads and math.gcd(model.kv_heads, small_mla.heads),
    vocab=0,
    dim=64,
    dense_layers=dense,
    layers=dense + 2,
    dense_width=128,
    bos_id=-1,
    eos_id=-1,
    mla=small_mla,
    moe=small_moe,
  )
  length = config.run.steps * config.data.batch_size * config.data.seq_len
  stretch = 20 * 8 * 128 / length
  data = dataclasses.replace(
    config.data,
    phases=tuple((n * stretch, weights) for n, weights in config.data.phases),
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
  optim, rl = dataclasses.replace(config.optim, warmup_steps=5), config.rl
  if rl.task:
    rl = _small_rl(rl)
    rows = rl.prompts * rl.samples // rl.minibatches
    data = dataclasses.replace(data, seq_len=32, batch_size=rows)
  return dataclasses.replace(
    config, model=small_model, data=data, run=run, optim=optim, rl=rl
  )


def _small_rl(rl: c.RLConfig) -> c.RLConfig:
  """Returns four questions with four short answers, by the same loss."""
  return dataclasses.replace(
    rl,
    task='sort3',
    template='plain',
    rewards=(('accuracy', 1.0),),
    prompts=4,
    samples=4,
    minibatches=min(rl.minibatches, 2),
    max_new=8,
    rows=0,
    overlong=min(rl.overlong, 4),
    heldout=8,
  )
