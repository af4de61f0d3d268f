"""Time and money of a plan: FLOPs at an assumed rate, and a list of prices."""

from __future__ import annotations

import dataclasses

from mla_moe import cost
from mla_moe.data import batches

from . import search, traffic

# DeepSeek-V3's pre-training reached this fraction of the H800's bf16 peak,
# counting causal attention ("Insights into DeepSeek-V3", Table 4).
UTILISATION = 0.3894


@dataclasses.dataclass(frozen=True)
class Bill:
  """Chip hours over all chips, dollars, days; and seconds of one step.

  `sending` is the time of a step's traffic at the links' speed, if none of it
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
  """Returns the bill for `tokens`.

  Args:
    plan: a config on a slice.
    tokens: of the whole training.
    utilisation: fraction of the chips' bf16 peak.
    dollars: an hour of a chip; 0 is the list's price.
  """
  config, chip, chip_count = plan.config, plan.slice.chip, plan.slice.chips
  hours, money = cost.hours_and_money(
    config,
    tokens,
    config.data.seq_len,
    devices=chip_count,
    peak_flops=chip.bf16 * chip.cores,
    utilisation=utilisation,
    dollars_per_hour=dollars or chip.dollars,
  )
  step_tokens = config.data.batch_size * config.data.seq_len
  days = hours / chip_count / 24
  return Bill(
    tokens=tokens,
    hours=hours,
    dollars=money,
    days=days,
    computing=days * 86400 * step_tokens / tokens,
    sending=sum(traffic.by_axis(config).values()) / chip.link,
  )


def tokens_of(config) -> float:
  """Returns the tokens of the config's whole run, its batch ramp included."""
  sequences, _ = batches.span(config.data, config.run.steps)
  return float(sequences * config.data.seq_len)
