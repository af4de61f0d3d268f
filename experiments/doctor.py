"""A report to paste into an issue: versions, devices, flags, disk, trouble.

  python -m experiments.doctor

Nothing is sent anywhere. The exit code is 1 if this machine has a version or a
pair of versions that is known not to work.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys

from . import commands

_PACKAGES = (
  'mla_moe',
  'jax',
  'jaxlib',
  'libtpu',
  'jax-cuda13-plugin',
  'jax-cuda12-plugin',
  'flax',
  'optax',
  'orbax-checkpoint',
  'ml_collections',
  'numpy',
  'ml_dtypes',
  'tokenizers',
  'safetensors',
  'tensorboard',
  'transformers',
  'torch',
)
_FLAGS = ('JAX_', 'XLA_', 'LIBTPU_', 'TPU_', 'NCCL_', 'CUDA_VISIBLE', 'TF_CPP')
_NVIDIA = (
  'dev/nvidia[0-9]*',
  'proc/driver/nvidia/version',
  'usr/lib/wsl/lib/libcuda.so.1',
)
_GOOGLE = '0x1ae0'
# The extra, its package, and the hint where that is installed.
_CURES = {
  'gpu': (
    'cuda',
    'jax-cuda',
    'CUDA 13 needs driver 580, which nvidia-smi shows',
  ),
  'tpu': ('tpu', 'libtpu', 'another process may have it, for it has one user'),
}
_DEVICES = """
import jax
for d in jax.devices():
  stats = d.memory_stats() or {}
  size = stats.get('bytes_limit', 0) / 2**30
  kind = [] if d.device_kind == d.platform else [d.device_kind]
  print(d.platform, *kind, *([f'{size:.1f} GiB'] if size else []), sep='; ')
"""


def versions() -> dict[str, str]:
  """Returns the version of every package of interest that is installed."""
  installed = {}
  for name in _PACKAGES:
    try:
      installed[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return installed


def number(version: str) -> tuple[int, ...]:
  """Returns (0, 12, 9) of '0.12.9.1rc2': the first three parts, as numbers."""
  parts = []
  for part in version.split('.')[:3]:
    digits = ''.join(c for c in part if c.isdigit())
    parts.append(int(digits or 0))
  return tuple(parts)


def trouble(installed: dict[str, str], python: tuple[int, ...]) -> list[str]:
  """Returns a line for each known trouble with these versions, and its cure."""
  have = {name: number(version) for name, version in installed.items()}
  jax, flax = have.get('jax', ()), have.get('flax', ())
  lines = []
  if python < (3, 11):
    lines.append('Python is too old: 3.11 or newer is needed')
  if jax and jax < (0, 10, 2):
    lines.append('jax is too old: pip install "jax>=0.10.2"')
  if flax and flax < (0, 12, 8):
    lines.append('flax is too old: pip install "flax>=0.12.10"')
  if flax == (0, 12, 9):
    lines.append('flax 0.12.9 is broken: pip install "flax>=0.12.10"')
  if flax and flax < (0, 12, 10) and jax >= (0, 11, 1):
    lines.append(
      'this flax fails to import flax.nnx on this jax (mla_moe does not need '
      'it, other programs may): pip install "flax>=0.12.10"'
    )
  if 'jaxlib' in have and jax and have['jaxlib'][:2] != jax[:2]:
    lines.append('jax and jaxlib do not match: pip install -U jax jaxlib')
  if 'jax-cuda12-plugin' in have and 'jax-cuda13-plugin' in have:
    lines.append('plugins of CUDA 12 and 13 are both there: uninstall one')
  if 'libtpu' in have and any('cuda' in name for name in have):
    lines.append('libtpu and a CUDA plugin are both there: set JAX_PLATFORMS')
  return lines


def devices(seconds: float = 60) -> list[str]:
  """Returns jax's devices, listed in a process of its own: drivers may hang."""
  command = [sys.executable, '-c', _DEVICES]
  try:
    process = subprocess.run(
      command, capture_output=True, text=True, timeout=seconds
    )
  except subprocess.TimeoutExpired:
    return [f'jax did not start within {seconds:.0f} s']
  if process.returncode:
    return [(process.stderr.strip().splitlines() or ['jax failed'])[-1]]
  return process.stdout.strip().splitlines()


def accelerators(root: pathlib.Path = pathlib.Path('/')) -> dict[str, str]:
  """Returns a file that shows an accelerator, by jax's name of its platform.

  `root` is the folder of dev, proc, sys and usr. Chips of newer TPUs are
  devices of VFIO, as others' may be: then the bus must have one of Google's.
  """
  shows = {}
  for pattern in _NVIDIA:
    for path in sorted(root.glob(pattern))[:1]:
      shows.setdefault('gpu', f'/{path.relative_to(root)}')
  chips = sorted(root.glob('dev/accel[0-9]*'))
  if any(
    path.read_text(encoding='utf-8').strip() == _GOOGLE
    for path in root.glob('sys/bus/pci/devices/*/vendor')
  ):
    chips += sorted(root.glob('dev/vfio/[0-9]*'))
  if chips:
    shows['tpu'] = f'/{chips[0].relative_to(root)}'
  return shows


def unseen(
  shows: dict[str, str], lines: list[str], installed: dict[str, str], only: str
) -> list[str]:
  """Returns a line for each accelerator that jax does not see, and its cure.

  Args:
    shows: of `accelerators`.
    lines: of `devices`; each begins with a platform.
    installed: of `versions`.
    only: JAX_PLATFORMS.
  """
  seen = {line.split(';')[0] for line in lines}
  troubles = []
  for kind in sorted(set(shows) - seen):
    extra, package, hint = _CURES[kind]
    if only and kind not in only.replace('cuda', 'gpu').split(','):
      cure = f'JAX_PLATFORMS={only} hides it'
    elif not any(name.startswith(package) for name in installed):
      cure = f'pip install "mla_moe[{extra}]"'
    else:
      cure = hint
    troubles.append(
      f'{shows[kind]} is there, and jax sees no {kind.upper()}: {cure}'
    )
  return troubles


def _memory() -> str:
  try:
    pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (ValueError, OSError):
    return '?'
  return f'{pages / 2**30:.1f} GiB'


def commit() -> str:
  """Returns the clone's commit, or 'unknown'."""
  root = pathlib.Path(__file__).parent.parent
  if not (root / '.git').exists():  # another project's may be around it
    return 'unknown'
  command = ['git', '-C', str(root), 'describe', '--always', '--dirty']
  try:
    git = subprocess.run(command, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return 'unknown'
  return git.stdout.strip() or 'unknown'


def main() -> None:
  """Prints the report."""
  if sys.argv[1:]:
    print(commands.typed(__doc__))
    sys.exit(0 if sys.argv[1:] == ['--help'] else 2)
  installed = versions()
  print(f'commit    {commit()}')
  print(f'python    {platform.python_version()} on {platform.platform()}')
  print(f'machine   {os.cpu_count()} cores, {_memory()} memory')
  free = shutil.disk_usage('.').free / 2**30
  print(f'disk      {free:.1f} GiB free here')
  print('packages  ' + ', '.join(f'{n} {v}' for n, v in installed.items()))
  flags = {k: v for k, v in os.environ.items() if k.startswith(_FLAGS)}
  for name, value in sorted(flags.items()):
    print(f'flag      {name}={value}')
  seen = devices()
  for line in seen:
    print(f'device    {line}')
  lines = trouble(installed, sys.version_info[:3])
  only = os.environ.get('JAX_PLATFORMS', '')
  if only:
    lines = [line for line in lines if 'set JAX_PLATFORMS' not in line]
  lines += unseen(accelerators(), seen, installed, only)
  if importlib.util.find_spec('fcntl') is None:
    lines.append('a run needs Linux or macOS, and WSL2 on Windows')
  if free < 2:
    lines.append('less than 2 GiB of disk are free: a checkpoint may not fit')
  for line in lines:
    print(f'trouble   {line}')
  print('No known trouble.' if not lines else '')
  sys.exit(1 if lines else 0)


if __name__ == '__main__':
  main()
