"""Time and money of a plan: arithmetic, and what it assumes."""

from __future__ import annotations

import dataclasses

from experiments.plan import memory, search
from mla_moe import cost
from mla_moe.data import batches

# What DeepSeek-V3's pre-training reached of the H800's bf16 peak, counting
# causal attention ("Insights into DeepSeek-V3", Table 4).
UTILISATION = 0.3894


@dataclasses.dataclass(frozen=True)
class Bill:
  """Chip hours over all chips, dollars, days; seconds of one step.

  `sending` is what a step's traffic takes at the links' speed if none of it
  hides behind the computing.
  """

  tokens: float
  hours: float
  dollars: float
  days: float
  computing: float
  sending: float


def bill(
  plan: search.Plan, tokens: float, utilisation: float, dollars: float
) -> Bill:
  """The bill for `tokens`; `dollars` an hour of a chip, 0: the list's price."""
  config, on = plan.config, plan.slice
  chip = on.chip
  hours, money = cost.hours_and_money(
    config,
    tokens,
    config.data.seq_len,
    devices=on.chips,
    peak_flops=chip.bf16 * chip.cores,
    utilisation=utilisation,
    dollars_per_hour=dollars or chip.dollars,
  )
  step_tokens = config.data.batch_size * config.data.seq_len
  days = hours / on.chips / 24
  return Bill(
    tokens=tokens,
    hours=hours,
    dollars=money,
    days=days,
    computing=days * 86400 * step_tokens / tokens,
    sending=sum(memory.traffic(config).values()) / chip.link,
  )


def tokens_of(config) -> float:
  """The tokens of the config's whole run, its batch ramp included."""
  before, _ = batches.span(config.data, config.run.steps)
  return float(before * config.data.seq_len)
