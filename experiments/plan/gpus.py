"""NVIDIA's GPUs as XLA's compiler wants to hear of them when none is here.

The numbers are the makers' and what the driver says of such a card (XLA keeps
the same in xla/tools/hlo_opt/gpu_specs). XLA chooses tiles and fusions by them;
what it would measure on the card (its autotuner) it takes by default instead.
"""

from __future__ import annotations

import math

from experiments import chips

# Name, compute capability, multiprocessors, GHz, bytes of L2.
_CARDS = {
  'h100': ('NVIDIA H100 80GB HBM3', 9, 132, 1.98, 50 * 2**20),
  'h800': ('NVIDIA H800', 9, 132, 1.98, 50 * 2**20),
  'h200': ('NVIDIA H200', 9, 132, 1.98, 50 * 2**20),
  'b200': ('NVIDIA B200', 10, 148, 1.965, 132644864),
}
_HOST = 8  # GPUs of one machine


def topology(on: chips.Slice) -> dict[str, str]:
  """What `topologies.get_topology_desc` needs to know, besides the platform."""
  each = math.gcd(on.devices, _HOST)
  return {
    'target_config': _description(on.kind),
    'topology': f'1x{on.devices // each}x{each}',
  }


def _description(kind: str) -> str:
  """XLA's GpuTargetConfigProto, as text."""
  name, capability, cores, clock, cache = _CARDS[kind]
  chip = chips.CHIPS[kind]
  return f"""
    platform_name: "CUDA"
    device_description_str: "{name}"
    runtime_version {{ major: 13 }}
    dnn_version_info {{ major: 9 minor: 13 }}
    gpu_device_info {{
      cuda_compute_capability {{ major: {capability} }}
      core_count: {cores}
      fpus_per_core: 128
      clock_rate_ghz: {clock}
      l2_cache_size: {cache}
      memory_bandwidth: {chip.bandwidth:.0f}
      device_memory_size: {chip.usable / chips.SHARE:.0f}
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      registers_per_block_limit: 65536
      registers_per_core_limit: 65536
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: 232448
      shared_memory_per_core: 233472
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
    }}
  """
