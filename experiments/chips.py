"""Accelerators as data: peaks, memory, list prices, and their slices.

Peaks and bandwidths are the makers' (cloud.google.com/tpu/docs: v5e, v5p, v6e,
tpu7x; NVIDIA's and AMD's data sheets; read 2026-11-24 and 29): dense products
with sums in float32. Ada's GeForce halves that rate, its data-centre cards do
not (NVIDIA's Ada white paper, appendix A). A TPU's usable memory is the number
that libtpu 0.0.50 prints when it refuses a program that is too large. Of a
GPU's, as its driver or data sheet has it, `MEMORY_FRACTION` is assumed, as with
XLA_PYTHON_CLIENT_MEM_FRACTION=0.92.

A price is that of an on-demand chip's hour in the US, as secondary sources of
2026 quote it (Google's price page was not at hand; Ironwood has no public list
price; GPUs' are rounded market prices). The H800's $2 is the assumption of the
DeepSeek-V3 report's Table 1. They change: give yours with --dollars.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types

from mla_moe import cost
from mla_moe.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of accelerator; numbers are of a device, of which it has `cores`.

  Attributes:
    bf16: peak FLOP/s; float32's where there is no bfloat16 unit.
    fp8: peak FLOP/s; bf16's where there is no FP8 unit.
    usable: bytes of memory that a program can have.
    bandwidth: bytes a second of that memory.
    link: bytes a second to all neighbours together.
    dollars: an hour of the whole chip.
    dimensions: of the network that wires a slice; 1 for GPUs.
    cores: devices of a chip.
    of_host: most chips of a TPU's machine, on which one process runs.
    margin: fraction of `usable` that a plan leaves free. Programs compiled for
      GPUs need up to 11 % more than the arithmetic (docs/plan.md), and NCCL and
      cuBLAS take memory of their own; no program for TPUs does either.
    capability: CUDA's compute capability, by which `fp8.choose` knows the FP8
      products of a GPU: none below 8.9, one scale along the sum from there on,
      blocks from 9.0 on. 0 is no NVIDIA GPU.
  """

  bf16: float
  fp8: float
  usable: float
  bandwidth: float
  link: float
  dollars: float
  dimensions: int
  cores: int = 1
  of_host: int = 4
  margin: float = 0.04
  capability: float = 0.0


GIB = 2.0**30
MEMORY_FRACTION = 0.92
# The part of memory that a plan leaves free on several slices. libtpu 0.0.50
# needed 33.54 GiB for V3 on v6e:16x16*4, and the arithmetic 29.13.
SLICES_MARGIN = 0.15


def _gpu(bf16, fp8, memory, bandwidth, link, dollars, capability) -> Chip:
  more = {'margin': 0.1, 'capability': capability}
  usable = MEMORY_FRACTION * memory
  return Chip(bf16, fp8, usable, bandwidth, link, dollars, 1, **more)


# A link is one direction's: NVLink's, or PCIe's 16 lanes where there is none
# (Gen3 on the T4, Gen5 on the RTX PRO 6000, else Gen4). The T4 multiplies
# bfloat16 in float32 (openxla/xla issue 12429). AMD's FP8 has another zero
# (E4M3FNUZ), for which nothing here has a product.
CHIPS = {
  'v5e': Chip(197e12, 197e12, 15.75 * GIB, 819e9, 200e9, 1.20, 2, of_host=8),
  'v6e': Chip(918e12, 918e12, 31.24 * GIB, 1640e9, 400e9, 2.70, 2, of_host=8),
  'v5p': Chip(459e12, 459e12, 95.73 * GIB, 2765e9, 600e9, 4.20, 3),
  'tpu7x': Chip(
    1153.5e12, 2307e12, 94.74 * GIB, 3690e9, 600e9, 12.0, 3, cores=2
  ),
  't4': _gpu(8.1e12, 8.1e12, 15 * GIB, 300e9, 16e9, 0.35, 7.5),
  'l4': _gpu(121e12, 242e12, 24e9, 300e9, 32e9, 0.7, 8.9),
  'rtx4090': _gpu(165.2e12, 330.3e12, 24e9, 1008e9, 32e9, 0.4, 8.9),
  'l40s': _gpu(362e12, 733e12, 48e9, 864e9, 32e9, 1.5, 8.9),
  'rtxpro6000': _gpu(503.8e12, 1007.6e12, 96e9, 1792e9, 64e9, 1.8, 12.0),
  'a100-40gb': _gpu(312e12, 312e12, 40 * GIB, 1555e9, 300e9, 1.3, 8.0),
  'a100-80gb': _gpu(312e12, 312e12, 80 * GIB, 2039e9, 300e9, 1.8, 8.0),
  'h800': _gpu(989e12, 1979e12, 84978434048, 3350e9, 200e9, 2.0, 9.0),
  'h100': _gpu(989e12, 1979e12, 84978434048, 3350e9, 450e9, 3.0, 9.0),
  'h200': _gpu(989e12, 1979e12, 139 * GIB, 4800e9, 450e9, 4.0, 9.0),
  'b200': _gpu(2250e12, 4500e12, 191514673152, 8000e9, 900e9, 6.0, 10.0),
  'mi300x': _gpu(1307.4e12, 2614.9e12, 192e9, 5300e9, 448e9, 2.0, 0),
}

_ALIASES = {
  'v5litepod': 'v5e',
  'v5': 'v5p',
  'v7x': 'tpu7x',
  'a100': 'a100-80gb',
}

_SLICES = {
  1: [(2**i,) for i in range(12)],
  2: [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)],
  3: [
    (2, 2, 1),
    (2, 2, 2),
    (2, 2, 4),
    (2, 4, 4),
    (4, 4, 4),
    (4, 4, 8),
    (4, 8, 8),
    (8, 8, 8),
    (8, 8, 16),
    (8, 16, 16),
    (16, 16, 16),
  ],
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """Chips of one kind that are wired together, for example v5p:4x4x4.

  `count` of them are connected by the data centre's network: v6e:16x16*2.
  """

  kind: str
  shape: tuple[int, ...]
  count: int = 1

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.count

  @property
  def devices(self) -> int:
    return self.chips * self.chip.cores

  @property
  def gpu(self) -> bool:
    return self.chip.dimensions == 1

  @property
  def margin(self) -> float:
    """The part of memory that a plan leaves free."""
    more = SLICES_MARGIN if self.count > 1 else 0.0
    return max(self.chip.margin, more)

  @property
  def planned(self) -> float:
    """Bytes of a device that a plan may fill."""
    return self.chip.usable * (1 - self.margin)

  @property
  def ragged(self) -> bool:
    """Whether devices have a ragged all-to-all: `sharding.ragged_exchange`."""
    return self.kind != 'v5e' or self.chips <= 16

  @property
  def device(self) -> types.SimpleNamespace:
    """The attributes of a jax.Device that `fp8.choose` reads."""
    return types.SimpleNamespace(
      platform='gpu' if self.gpu else 'tpu',
      device_kind=self.kind,
      compute_capability=self.chip.capability,
    )

  def __str__(self):
    more = f'*{self.count}' if self.count > 1 else ''
    return f'{self.kind}:{"x".join(map(str, self.shape))}{more}'


def of_device(kind: str) -> Chip | None:
  """Returns the chip of a GPU's `device_kind`, None if it is not in CHIPS."""
  words = re.findall('[a-z0-9]+', kind.lower())
  ends = range(len(words) + 1)
  joined = {''.join(words[i:j]) for j in ends for i in range(j)}
  named = (n for n in CHIPS if joined.issuperset(n.split('-')))
  return CHIPS.get(next(named, ''))


def parse(text: str) -> Slice:
  """Returns the slice of a name: v5p:4x4x4, v5e-16, h100:64, v6e:16x16*2.

  Raises:
    ConfigError: the kind or the shape does not exist; lists those that do.
  """
  text, _, count = text.lower().partition('*')
  count = int(count) if count.isdigit() and int(count) else 1
  pattern = r'([a-z0-9]+(?:-\d+gb)?)[:-]([0-9]+(?:x[0-9]+)*)'
  match = re.fullmatch(pattern, text)
  kind = match[1] if match else ''
  kind = _ALIASES.get(kind, kind)
  if kind not in CHIPS:
    raise ConfigError(
      f'--topology={text!r}: name a chip and its shape, such as v5p:4x4x4, '
      f'v5e:4x4 or h100:64; the chips are {", ".join(CHIPS)}'
    )
  shape = tuple(int(n) for n in match[2].split('x'))
  if CHIPS[kind].dimensions == 1:
    if len(shape) > 1 or not shape[0]:
      raise ConfigError(
        f'--topology={text!r}: give the number of GPUs, such as {kind}:64'
      )
    return Slice(kind, shape)
  known = _SLICES[CHIPS[kind].dimensions]
  if len(shape) == 1:  # by size
    shape = next((s for s in known if math.prod(s) == shape[0]), shape)
  if shape not in known:
    shapes = ', '.join('x'.join(map(str, s)) for s in known)
    raise ConfigError(f'--topology={text!r}: {kind} slices are {shapes}')
  return Slice(kind, shape, count)


def holding(kind: str, size: float) -> int:
  """Returns the number of chips of which a plan fills `size` bytes.

  More than one slice has are several, which leave more memory free.
  """
  one = Slice(kind, _SLICES[CHIPS[kind].dimensions][-1])
  of = lambda slice_: math.ceil(size / slice_.chip.cores / slice_.planned)
  if one.gpu or of(one) <= one.chips:
    return of(one)
  return of(dataclasses.replace(one, count=2))


def slices(kind: str) -> list[Slice]:
  """Returns a kind's slices, smallest first; of TPUs also 2 to 16 of them."""
  single = [Slice(kind, shape) for shape in _SLICES[CHIPS[kind].dimensions]]
  if CHIPS[kind].dimensions == 1:
    return single
  largest = single[-1].shape
  return single + [Slice(kind, largest, n) for n in (2, 4, 8, 16)]


def hours_and_money(
  config,
  tokens: float,
  seq_len: int,
  *,
  devices: int,
  peak_flops: float,
  utilisation: float,
  dollars_per_hour: float,
) -> tuple[float, float]:
  """Returns the device hours to train on `tokens`, and their price in dollars.

  The hours are summed over `devices`: a run lasts hours / devices. `peak_flops`
  is the peak of one device in FLOP/s, `utilisation` the fraction of it that is
  reached.
  """
  rate = devices * peak_flops * utilisation
  seconds = tokens * cost.train_flops_per_token(config, seq_len) / rate
  hours = seconds / 3600 * devices
  return hours, hours * dollars_per_hour
