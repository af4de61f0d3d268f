"""Plans a run on given hardware: memory, traffic, time and money.

  python -m experiments.plan --config=configs/deepseek_v3.py
  python -m experiments.plan --config=configs/deepseek_v3.py \\
    --topology=v5p:8x8x8 --mesh=fsdp=64,expert=8
  python -m experiments.plan --config=configs/deepseek_v2_lite.py \\
    --topology=v5e:4x4 --mesh=fsdp=16 --compile

Without --topology: the smallest slice of every chip. A plan that cannot fit is
refused with the smallest slice that does (exit code 2). --compile compiles the
training step for the topology on this CPU (extra [tpu], or [cuda] for GPUs);
--schedule stops before a TPU's machine code: V3 takes a minute.
"""

from __future__ import annotations

import dataclasses
import pathlib
import signal
import sys

from absl import flags

from mla_moe.config import ConfigError

from .. import chips, cli
from . import compiled, scheduled


def _define() -> None:
  cli.define()
  flags.DEFINE_string(
    'topology', '', 'Slice: v5p:4x4x4, v5e-16, h100:64, a100-40gb:4.'
  )
  flags.DEFINE_string('mesh', '', 'Axes: fsdp=8,expert=8; else the best.')
  flags.DEFINE_float('tokens', 0, "Token budget; 0: the config's run.")
  flags.DEFINE_float('utilisation', 0, "Fraction of the peak; 0: V3's.")
  flags.DEFINE_float('dollars', 0, "Price of a chip's hour; 0: the list's.")
  flags.DEFINE_bool('compile', False, 'Compile the step for the topology, too.')
  flags.DEFINE_bool('schedule', False, 'The same up to its schedule, for TPUs.')
  cli.define_path('out', '', 'File of the page to write, such as plan.html.')


def _main() -> None:
  values = cli.FLAGS
  config = cli.config()
  start = config.mesh
  slice_ = chips.parse(values.topology) if values.topology else None
  _check(values, slice_)
  import jax

  # Shapes need no accelerator, and libtpu serves one process at a time: the
  # one that compiles.
  jax.config.update('jax_platforms', 'cpu')
  from mla_moe import fp8

  from ..adapters import base as frozen_base
  from ..adapters.state import abstract_state
  from . import bill, report, search

  if values.mesh:
    mesh = search.mesh_of(values.mesh, config.mesh)
    try:
      config = dataclasses.replace(config, mesh=mesh)
    except ConfigError as error:
      raise ConfigError(f'--mesh={values.mesh}: {error}') from None
  frozen_base.check(config)
  tokens = values.tokens or bill.tokens_of(config)
  utilisation = values.utilisation or bill.UTILISATION
  price = lambda plan: bill.bill(plan, tokens, utilisation, values.dollars)
  layout = abstract_state(config)
  if slice_ is None:
    kinds = [kind for kind in chips.CHIPS if kind != 'h800']
    plans = [search.smallest(config, kind, layout) for kind in kinds]
    pairs = [(plan, price(plan)) for plan in plans if plan]
    if not pairs:
      raise ConfigError(
        f'no slice of any chip holds this config: lower data.seq_len='
        f'{config.data.seq_len}, or name a mesh: --topology=v5p:16x16x16 '
        '--mesh=fsdp=8,expert=4,tensor=8,context=16'
      )
    report.show_choice(config, pairs, utilisation)
  else:
    fp8.choose(config.model.precision, config.model.compute.fp8, slice_.device)
    if config.mesh.devices == 1 < slice_.devices:
      best = search.best_on(config, slice_, layout)
      config = best.config if best else _all_fsdp(config, slice_)
    plan = search.plan(config, slice_, layout)
    search.refuse_if_too_large(plan, layout)
    pairs = [(plan, price(plan))]
    report.show(*pairs[0], utilisation, start)
    if values.compile or values.schedule:
      # The process that compiles ends with this one.
      signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
      compiler = compiled if values.compile else scheduled
      report.show_compiled(plan, compiler.run(config, slice_))
  if values.out:
    path = pathlib.Path(values.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
      report.page_of(config, pairs, utilisation), encoding='utf-8'
    )
    print(path)


def _all_fsdp(config, slice_):
  """Returns the config with all devices on fsdp, to refuse if no mesh fits."""
  from mla_moe.config import MeshConfig

  mesh = MeshConfig(fsdp=slice_.devices, states=config.mesh.states)
  data = dataclasses.replace(config.data, micro_batch=slice_.devices)
  return dataclasses.replace(config, mesh=mesh, data=data)


def _check(values, slice_) -> None:
  for name in ('tokens', 'utilisation', 'dollars'):
    if getattr(values, name) < 0:
      raise ConfigError(f'--{name}={getattr(values, name)}: must be positive')
  if values.utilisation > 1:
    raise ConfigError(f'--utilisation={values.utilisation}: must be at most 1')
  names = [n for n in ('compile', 'schedule') if getattr(values, n)]
  if len(names) > 1:
    raise ConfigError('--schedule: is a part of --compile; leave one out')
  if names and slice_ is None:
    raise ConfigError(f'--{names[0]}: needs a --topology, such as v5e:4x4')
  if names:
    compiled.check_compiler(slice_, f'--{names[0]}')


if __name__ == '__main__':
  cli.run(_main, _define)
