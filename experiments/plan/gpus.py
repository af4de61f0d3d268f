"""NVIDIA's GPUs as XLA's compiler reads of them when none is here.

The numbers are the maker's and the driver's of such a card (XLA has the same in
xla/tools/hlo_opt/gpu_specs). XLA chooses tiles and fusions by them; where its
autotuner would measure on the card, it takes its default instead.
"""

from __future__ import annotations

import math

from .. import chips

# Name, multiprocessors, GHz, bytes of L2.
CARDS = {
  'l4': ('NVIDIA L4', 58, 2.04, 48 * 2**20),
  'a100-40gb': ('NVIDIA A100-SXM4-40GB', 108, 1.41, 40 * 2**20),
  'a100-80gb': ('NVIDIA A100-SXM4-80GB', 108, 1.41, 40 * 2**20),
  'h100': ('NVIDIA H100 80GB HBM3', 132, 1.98, 50 * 2**20),
  'h800': ('NVIDIA H800', 132, 1.98, 50 * 2**20),
  'h200': ('NVIDIA H200', 132, 1.98, 50 * 2**20),
  'b200': ('NVIDIA B200', 148, 1.965, 132644864),
}
# By compute capability, of a multiprocessor: its float32 units, threads and
# KiB of shared memory, of which one block has all but one.
_CORES = {
  8.0: (64, 2048, 164),
  8.9: (128, 1536, 100),
  9.0: (128, 2048, 228),
  10.0: (128, 2048, 228),
}
_HOST = 8  # GPUs of one machine


def topology(slice_: chips.Slice) -> dict[str, str]:
  """Returns `topologies.get_topology_desc`'s arguments besides the platform."""
  per_host = math.gcd(slice_.devices, _HOST)
  hosts = slice_.devices // per_host
  return {
    'target_config': _description(slice_.kind),
    'topology': f'1x{hosts}x{per_host}',
  }


def _description(kind: str) -> str:
  """Returns XLA's GpuTargetConfigProto as text."""
  name, cores, clock, cache = CARDS[kind]
  chip = chips.CHIPS[kind]
  units, threads, shared = _CORES[chip.capability]
  major, minor = divmod(round(10 * chip.capability), 10)
  return f"""
    platform_name: "CUDA"
    device_description_str: "{name}"
    runtime_version {{ major: 13 }}
    dnn_version_info {{ major: 9 minor: 13 }}
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      core_count: {cores}
      fpus_per_core: {units}
      clock_rate_ghz: {clock}
      l2_cache_size: {cache}
      memory_bandwidth: {chip.bandwidth:.0f}
      device_memory_size: {chip.usable / chips.MEMORY_FRACTION:.0f}
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: {threads}
      registers_per_block_limit: 65536
      registers_per_core_limit: 65536
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: {(shared - 1) * 1024}
      shared_memory_per_core: {shared * 1024}
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
    }}
  """
