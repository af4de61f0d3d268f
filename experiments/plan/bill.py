"""Time and money of a plan: FLOPs at an assumed rate, and a list of prices."""

from __future__ import annotations

import dataclasses

from mla_moe import cost
from mla_moe.config import Config, MeshConfig

from .. import chips
from ..adapters import flops
from ..data import batches
from . import memory, rollout, search, traffic

# DeepSeek-V3's pre-training reached this fraction of the H800's bf16 peak,
# counting causal attention ("Insights into DeepSeek-V3", Table 4).
UTILISATION = 0.3894


@dataclasses.dataclass(frozen=True)
class Bill:
  """Chip hours over all chips, dollars, days; and seconds of one step.

  With reinforcement, hours contain `scoring`, by the reference and the old
  policy, and `answering`, a step's part of a rollout.
  `computing` and all before it contain a pipeline's bubble. `sending` is the
  time of a step's traffic at the links' speed, if none of it hides behind the
  computing.
  """

  tokens: float
  hours: float
  dollars: float
  days: float
  computing: float
  sending: float
  scoring: float = 0.0
  answering: float = 0.0


def bill(
  plan: search.Plan, tokens: float, utilisation: float, dollars: float
) -> Bill:
  """Returns the bill for `tokens`.

  Args:
    plan: a config on a slice.
    tokens: of the whole training.
    utilisation: fraction of the chips' bf16 peak.
    dollars: an hour of a chip; 0 is the list's price.
  """
  config, chip, chip_count = plan.config, plan.slice.chip, plan.slice.chips
  hours, money = chips.hours_and_money(
    config,
    tokens,
    config.data.seq_len,
    devices=chip_count,
    peak_flops=chip.bf16 * chip.cores,
    utilisation=utilisation,
    dollars_per_hour=dollars or chip.dollars,
  )
  share = flops.share(config, config.data.seq_len)
  hours, money = share * hours, share * money
  longer = 1 + _pipelined(config) * (1 / (1 - bubble(config.mesh)) - 1)
  steps = tokens / (config.data.batch_size * config.data.seq_len)
  computing = longer * hours / chip_count * 3600 / steps
  scoring = answering = 0.0
  if config.rl.task:
    # Scores have no gradients, and so none that a frozen base spares.
    scoring = computing / share * rollout.scoring(config)
    size = plan.footprint.decoding
    if config.mesh.devices == 1:  # else the codes are there once more
      size += memory.expert_codes_bytes(config)
    drawing = chip, utilisation, size
    answering = rollout.seconds(config, *drawing) / config.rl.minibatches
    longer *= 1 + (scoring + answering) / computing
  return Bill(
    tokens=tokens,
    hours=longer * hours,
    dollars=longer * money,
    days=longer * hours / chip_count / 24,
    computing=computing,
    sending=sum(traffic.by_axis(config).values()) / chip.link,
    scoring=scoring,
    answering=answering,
  )


def bubble(mesh: MeshConfig) -> float:
  """Returns the fraction of a pipeline's turns in which a device waits.

  It is (S - 1) / (M + S - 1) of S stages and M micro-batches (`memory.turns`).
  """
  micro_batches, turns = memory.turns(mesh)
  return 1 - micro_batches / turns


def _pipelined(config: Config) -> float:
  """Returns the fraction of the FLOPs in a pipeline, that of its layers."""
  model = config.model
  if config.mesh.stage == 1:
    return 0.0
  less = dataclasses.replace(model, layers=model.layers - 1)
  whole, rest = (
    cost.train_flops_per_token(m, config.data.seq_len) for m in (model, less)
  )
  return model.moe_layers * (1 - rest / whole)


def tokens_of(config: Config) -> float:
  """Returns the tokens of the config's whole run, its batch ramp included."""
  sequences, _ = batches.span(config.data, config.run.steps)
  return float(sequences * config.data.seq_len)
