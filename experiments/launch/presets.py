"""Compiler flags by name, each with its source.

XLA ends the process at a flag that it does not know, and libtpu refuses some
of one chip's flags on another. So a preset belongs to one kind of chip and is
never guessed: without --preset no flag is set.
"""

from __future__ import annotations

import dataclasses

from mla_moe.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Preset:
  """Environment of a training process, and the source of its flags.

  `kind` is a TPU's in `chips.CHIPS`, or 'gpu' for all GPUs.
  """

  kind: str
  source: str
  environment: dict[str, str]


def _libtpu(*flags: str) -> dict[str, str]:
  return {'LIBTPU_INIT_ARGS': ' '.join(flags)}


_RECIPES = 'AI-Hypercomputer/tpu-recipes, training/'
_V5P = (
  '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false',
  '--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false',
  '--xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter=false',
  '--xla_tpu_enable_sparse_core_collective_offload_all_gather=true',
  '--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true',
  '--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true',
  '--xla_tpu_enable_all_gather_offload_tracing=true',
  '--xla_tpu_enable_reduce_scatter_offload_tracing=true',
  '--xla_tpu_enable_all_reduce_offload_tracing=true',
  '--xla_tpu_use_tc_device_shape_on_sc=true',
  '--xla_sc_disable_megacore_partitioning=true',
  '--xla_tpu_scoped_vmem_limit_kib=81920',
  '--xla_enable_async_collective_permute=true',
)
PRESETS = {
  'v5e-overlap': Preset(
    'v5e',
    'MaxText end_to_end/tpu scripts: collectives beside computing',
    _libtpu(
      '--xla_tpu_enable_async_collective_fusion=true',
      '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
      '--xla_tpu_enable_async_collective_fusion_multiple_steps=true',
      '--xla_tpu_overlap_compute_collective_tc=true',
      '--xla_enable_async_all_gather=true',
    ),
  ),
  'v5p-sparsecore': Preset(
    'v5p',
    _RECIPES + 'v5p/DeepSeek3-671B-MaxText: collectives on the sparse cores',
    _libtpu(
      *_V5P,
    ),
  ),
  'v5p-split': Preset(
    'v5p',
    "v5p-sparsecore with ironwood's gathers along several axes of the torus: "
    'for meshes whose axes are no whole axes of it',
    _libtpu(
      *_V5P,
      '--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true',
      '--xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true',
      '--xla_enable_async_all_gather=true',
    ),
  ),
  'ironwood': Preset(
    'tpu7x',
    _RECIPES + 'ironwood/deepseek3-671b/4k-fp8-tpu7x-4x8x8: the core of it',
    _libtpu(
      '--xla_tpu_scoped_vmem_limit_kib=65536',
      '--xla_tpu_bf16_emission_mode=NATIVE_EMISSION',
      '--xla_tpu_enable_sparse_core_reduce_scatter_v2=true',
      '--xla_tpu_enable_sparse_core_collective_offload_all_gather=true',
      '--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true',
      '--xla_tpu_enable_all_gather_offload_tracing=true',
      '--xla_tpu_use_tc_device_shape_on_sc=True',
      '--xla_sc_disable_megacore_partitioning=True',
      '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false',
      '--xla_enable_async_all_gather=true',
      '--xla_tpu_prefer_async_allgather_to_allreduce=true',
      '--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true',
      '--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true',
      '--xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true',
      '--xla_tpu_use_single_sparse_core_for_all_gather_offload=true',
      '--xla_tpu_enable_concurrent_sparse_core_offloading=true',
    ),
  ),
  'gpu-overlap': Preset(
    'gpu',
    'JAX-Toolbox GPU performance notes: O1 turns on latency hiding and '
    'pipelined collectives',
    {
      'JAX_OPTIMIZATION_LEVEL': 'O1',
      'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92',
      'NCCL_NVLS_ENABLE': '0',
    },
  ),
}


def environment(name: str, kind: str) -> dict[str, str]:
  """Returns the environment of a preset on a `Preset.kind`; of '' none.

  Raises:
    ConfigError: no preset has this name, or it is another kind's.
  """
  if not name:
    return {}
  names = [n for n, preset in PRESETS.items() if preset.kind == kind]
  if name not in names:
    raise ConfigError(
      f'--preset={name!r}: for {kind} there is {", ".join(names) or "none"}'
    )
  return PRESETS[name].environment
