"""What a config needs, takes and costs on given hardware, before it is run.

  python -m experiments.plan --config=configs/deepseek_v3.py
  python -m experiments.plan --config=configs/deepseek_v3.py \\
    --topology=v5p:8x8x8 --mesh=fsdp=64,expert=8
  python -m experiments.plan --config=configs/deepseek_v2_lite.py \\
    --topology=v5e:4x4 --mesh=fsdp=16 --compile

Without --topology: the smallest slice of every chip. What cannot fit is
refused with the smallest that does (exit code 2). --compile has the training
step compiled for the topology on this CPU (extra [tpu], or [cuda] for GPUs).
"""

from __future__ import annotations

import dataclasses
import pathlib

from absl import flags

from experiments import chips, cli
from mla_moe.config import ConfigError


def _define() -> None:
  cli.define()
  flags.DEFINE_string('topology', '', 'Slice: v5p:4x4x4, v5e-16, h100:64.')
  flags.DEFINE_string('mesh', '', 'Axes: fsdp=8,expert=8; else the best.')
  flags.DEFINE_float('tokens', 0, "Token budget; 0: the config's run.")
  flags.DEFINE_float('utilisation', 0, 'Share of the peak; 0: as V3 reached.')
  flags.DEFINE_float('dollars', 0, "Price of a chip's hour; 0: the list's.")
  flags.DEFINE_bool('compile', False, 'Compile the step for the topology, too.')
  flags.DEFINE_string(
    'out', '', 'File of the page to write, such as plan.html.'
  )


def _main() -> None:
  values = cli.FLAGS
  config = cli.config()
  on = chips.parse(values.topology) if values.topology else None
  _check(values, on)
  import jax

  # Shapes need no accelerator, and libtpu serves one process at a time: the
  # one that compiles.
  jax.config.update('jax_platforms', 'cpu')
  from experiments.plan import bill, report, search

  if values.mesh:
    mesh = search.mesh_of(values.mesh, config.mesh.states)
    try:
      config = dataclasses.replace(config, mesh=mesh)
    except ConfigError as error:
      raise ConfigError(f'--mesh={values.mesh}: {error}') from None
  tokens = values.tokens or bill.tokens_of(config)
  utilisation = values.utilisation or bill.UTILISATION
  price = lambda plan: bill.bill(plan, tokens, utilisation, values.dollars)
  layout = search.layout_of(config)
  if on is None:
    kinds = [kind for kind in chips.CHIPS if kind != 'h800']
    found = [search.smallest(config, kind, layout) for kind in kinds]
    plans = [plan for plan in found if plan]
    if not plans:
      raise ConfigError('no slice of any chip holds this config; shorten it')
    pairs = [(plan, price(plan)) for plan in plans]
    report.show_choice(config, pairs, utilisation)
  else:
    if config.mesh.devices == 1 < on.devices:
      best = search.smallest_on(config, on, layout)
      config = best.config if best else _laid_flat(config, on)
    plan = search.plan(config, on, layout)
    search.refuse_if_too_large(plan, layout)
    pairs = [(plan, price(plan))]
    report.show(*pairs[0], utilisation)
    if values.compile:
      from experiments.plan import compiled

      report.show_compiled(plan, compiled.run(config, on))
  if values.out:
    path = pathlib.Path(values.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.page_of(config, pairs, utilisation))
    print(path)


def _laid_flat(config, on):
  """Everything on fsdp: the mesh to refuse when no mesh fits."""
  from mla_moe.config import MeshConfig

  mesh = MeshConfig(fsdp=on.devices)
  data = dataclasses.replace(config.data, micro_batch=on.devices)
  return dataclasses.replace(config, mesh=mesh, data=data)


def _check(values, on) -> None:
  for name in ('tokens', 'utilisation', 'dollars'):
    if getattr(values, name) < 0:
      raise ConfigError(f'--{name}={getattr(values, name)}: must be positive')
  if values.utilisation > 1:
    raise ConfigError(f'--utilisation={values.utilisation}: is a share of 1')
  if values.compile and on is None:
    raise ConfigError('--compile: needs a --topology, such as v5e:4x4')


if __name__ == '__main__':
  cli.run(_main, _define)
