"""A plan as tables in the terminal, and as a page with pictures."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from mla_moe import cost, fp8
from mla_moe.config import Config, MeshConfig

from .. import chips, page
from ..adapters import flops
from . import overlap, rollout, search, traffic
from .bill import bubble

_MEANS = {
  'parameters': 'float32 master weights',
  'gradients': 'float32, sums over micro-batches',
  'optimizer': 'its moments, float32',
  'copies': 'the parameters as the products read them',
  'residuals': 'of all layers, for the backward pass',
  'working': 'the largest layer, going backward',
  'gathered': "FSDP's copy of a layer, and its gradient",
  'logits': "the loss's blocks and the head's gradient",
  'reference': 'the policy that the divergence is measured from',
  'teachers': 'models that distil; one that is not here is like the policy',
  'routes': "an update's tokens, with the experts that the rollout chose",
  'decoding': 'in a rollout: the weights in the layout of decoding',
  'cache': "in a rollout: its answers' latents",
  'base': 'the frozen weights under adapters, as their codes',
}


_MOMENTS = 'an update', 'a rollout'


def wide() -> Console:
  """Returns a console that cuts no figure off, however narrow it is."""
  return Console(highlight=False, width=max(Console().width, 110))


def lacking(config: Config, slices: list[chips.Slice]) -> Iterator[str]:
  """Yields a line for each number format that some slices do not multiply."""
  model = config.model
  slow = lambda s: fp8.choose(model.precision, device=s.device)[1]
  kinds = [s.kind for s in slices if slow(s)]
  if kinds:
    yield (
      f'precision={model.precision} has no FP8 hardware on {", ".join(kinds)}: '
      'numbers are rounded to FP8 and multiplied wider'
    )
  kinds = [s.kind for s in slices if 0 < s.chip.capability < 8]
  if kinds and model.dtype == 'bfloat16':
    yield (
      f'dtype=bfloat16 has no hardware on {", ".join(kinds)}: products are '
      'float32, and no faster than with config.model.dtype=float32'
    )


def show(plan, bill, utilisation: float, start: MeshConfig) -> None:
  """Prints one config on one slice; `start` is the mesh before planning."""
  console = wide()
  console.print(_headline(plan.config))
  chip, total = plan.slice.chip, plan.footprint.total
  table = _table(
    f'One device of {plan.slice}, mesh {search.mesh_text(plan.config.mesh)}',
    ('memory', 'GiB', 'share', ''),
  )
  for name, size in _sizes(plan.footprint).items():
    fraction = size / chip.usable
    bar = '█' * round(24 * fraction)
    table.add_row(name, _gib(size), f'{fraction:.1%}', f'{bar} {_MEANS[name]}')
  table.add_section()
  moment = _MOMENTS[plan.footprint.rollout > plan.footprint.update]
  moment = f'in {moment}, the fuller one' if plan.footprint.rollout else ''
  table.add_row('all', _gib(total), f'{total / chip.usable:.1%}', moment)
  free = f'of which a plan leaves {plan.slice.margin:.0%} free'
  table.add_row('there is', _gib(chip.usable), '', free)
  console.print(table)
  table = _table('A step', ('', ''))
  for name, value in _step_rows(plan, bill):
    table.add_row(name, value)
  console.print(table)
  console.print(_money(bill, utilisation))
  for line in lacking(plan.config, [plan.slice]):
    console.print(line, soft_wrap=True)
  flags = search.training_flags(plan.config, start)
  console.print(f'To train it so: {flags}', soft_wrap=True)


def show_choice(config, pairs, utilisation: float) -> None:
  """Prints the smallest slice of every chip."""
  console = wide()
  console.print(_headline(config))
  columns = ('slice', 'mesh', 'GiB', 'of', 'days', 'chip hours', 'dollars')
  table = _table('The smallest slice that holds it', columns)
  for plan, bill in pairs:
    table.add_row(
      str(plan.slice),
      search.mesh_text(plan.config.mesh),
      _gib(plan.footprint.total),
      _gib(plan.slice.chip.usable),
      _figure(bill.days),
      _figure(bill.hours),
      _figure(bill.dollars),
    )
  console.print(table)
  for line in lacking(config, [plan.slice for plan, _ in pairs]):
    console.print(line, soft_wrap=True)
  console.print(
    f'{pairs[0][1].tokens:,.4g} tokens at {utilisation:.1%} of the bf16 peak; '
    'list prices (experiments/chips.py), --dollars=N for yours.'
  )


def show_compiled(plan, compiled: dict) -> None:
  """Prints `compiled.run`'s figures beside the arithmetic."""
  console = wide()
  table = _table('Compiled, one device', ('', 'GiB', 'arithmetic'))
  for name, kind, size in (
    ('state', 'arguments', plan.footprint.state),
    ('scratch', 'temporary', plan.footprint.update),
  ):
    table.add_row(f'{name} ({kind})', _gib(compiled[kind]), _gib(size))
  console.print(table)
  table = _table('Collectives of a step', ('axis', 'kind', 'count', 'GiB'))
  for row in compiled['collectives']:
    table.add_row(
      row['axis'], row['kind'], f'{row["count"]:,}', _gib(row['bytes'])
    )
  for axis, size in traffic.by_axis(plan.config).items():
    if size:
      table.add_row(axis, 'arithmetic', '', _gib(size))
  console.print(table)
  console.print(beside(compiled['overlap']), soft_wrap=True)
  console.print(
    f'Copies and casts of whole arrays write {_gib(compiled["copies"])} GiB.'
  )
  console.print(
    f'jax {compiled["jax"]}, {compiled["compiler"]}; compiled in '
    f'{compiled["seconds"]:.0f} s.'
  )


def beside(rows: list[dict]) -> str:
  """Returns a line of `overlap.overlap`'s rows."""
  all_of = lambda row: sum(row[state] for state in overlap.STATES)
  words = [
    f'{row["beside"]:,} of {all_of(row):,} {row["kind"]}' for row in rows
  ]
  idle = sum(row['idle'] for row in rows)
  return (
    f'Transfers with a product beside them: {", ".join(words) or "none"}; '
    f'{idle:,} others are asynchronous with nothing beside them.'
  )


def page_of(config, pairs, utilisation: float) -> str:
  """Returns the page: numbers on top, memory and money below."""
  plan, bill = pairs[0]
  counts = cost.parameters(config)
  cheapest = min(pairs, key=lambda pair: pair[1].dollars)
  parts = [
    page.numbers(
      [
        ('parameters', _count(counts.total)),
        ('active', _count(counts.active)),
        ('tokens', _count(bill.tokens)),
        ('slice', str(cheapest[0].slice)),
        ('chip hours', _figure(cheapest[1].hours)),
        ('dollars', _figure(cheapest[1].dollars)),
        ('days', _figure(cheapest[1].days)),
      ]
    ),
    f'<p>{utilisation:.1%} of the bf16 peak is assumed, and list prices.</p>',
    '<h2>Memory of one device</h2>',
    page.svg(draw_memory([plan for plan, _ in pairs])),
    '<h2>Time and money</h2>',
    page.svg(draw_money(pairs)),
  ]
  return page.page('Plan', parts)


def draw_memory(plans):
  """Returns stacked bars of the plans' footprints, and their memories' ends."""
  figure, axes = page.figure(1, 0.9 + 0.5 * len(plans))
  plot = axes[0, 0]
  places = range(len(plans))
  left = [0.0] * len(plans)
  colours = (*page.COLOURS, '#999999', '#332288', '#117733', '#882255')
  shown = [_at_once(plan.footprint) for plan in plans]
  names = [n for n in _MEANS if any(n in sizes for sizes in shown)]
  for name, colour in zip(names, itertools.cycle(colours), strict=False):
    meaning = _MEANS[name]
    sizes = [sizes.get(name, 0) / 2**30 for sizes in shown]
    plot.barh(
      places, sizes, left=left, color=colour, label=f'{name}: {meaning}'
    )
    left = [a + b for a, b in zip(left, sizes, strict=True)]
  for i, plan in enumerate(plans):
    end = plan.slice.chip.usable / 2**30
    plot.plot([end, end], [i - 0.45, i + 0.45], color='#1d2330', lw=3)
  plot.set_yticks(
    places,
    [f'{p.slice}\n{search.mesh_text(p.config.mesh)}' for p in plans],
  )
  plot.invert_yaxis()
  plot.set_xlabel('GiB; a program can have as much as the black line')
  plot.legend(
    frameon=False, fontsize=8, loc='upper left', bbox_to_anchor=(1, 1)
  )
  return figure


def draw_money(pairs):
  """Returns bars of every plan's days and dollars."""
  figure, axes = page.figure(2, 0.9 + 0.45 * len(pairs))
  names = [str(plan.slice) for plan, _ in pairs]
  plots = (
    ('days', 'days', lambda bill: bill.days),
    ('million dollars', 'money', lambda bill: bill.dollars / 1e6),
  )
  for plot, (unit, title, value) in zip(axes[0], plots, strict=True):
    sizes = [value(bill) for _, bill in pairs]
    bars = plot.barh(names, sizes, color=page.COLOURS[title == 'money'])
    plot.bar_label(bars, [f'{size:,.3g}' for size in sizes], padding=4)
    plot.invert_yaxis()
    plot.margins(x=0.15)
    plot.set(title=title, xlabel=unit)
  return figure


def _sizes(footprint) -> dict[str, int]:
  """Returns the parts, without those of use that are not there."""
  sizes = dataclasses.asdict(footprint)
  ours = 'reference', 'teachers', 'routes', 'decoding', 'cache', 'base'
  return {name: n for name, n in sizes.items() if n or name not in ours}


def _at_once(footprint) -> dict[str, int]:
  """Returns the parts that the fullest moment has; their sum is `total`."""
  state = 'parameters', 'optimizer', 'base', 'reference', 'teachers'
  ours = 'decoding', 'cache'
  is_rollout = footprint.rollout > footprint.update
  return {
    name: size
    for name, size in _sizes(footprint).items()
    if name in state or (name in ours) == is_rollout
  }


def _step_rows(plan, bill) -> list[tuple[str, str]]:
  config = plan.config
  data, mesh = config.data, config.mesh
  micro = data.micro_batch or data.batch_size
  times = data.batch_size // micro
  rows = [
    ('sequences', f'{data.batch_size:,} of {data.seq_len:,} tokens'),
    ('micro-batches', f'{times:,} of {micro:,}'),
    ('computing', f'{bill.computing:,.2f} s'),
    ('sending, if nothing hides it', f'{bill.sending:,.2f} s'),
  ]
  if config.rl.task:
    rl = config.rl
    answers = f'{rl.prompts * rl.samples:,} of {rl.max_new:,} tokens'
    rows += [
      ('scoring, by all but the policy', f'{bill.scoring:,.2f} s'),
      (
        f'answering, 1/{rl.minibatches} of a rollout',
        f'{bill.answering:,.2f} s',
      ),
      ('answers of a rollout', answers),
    ]
    record = rollout.record_bytes(config, rl.prompts * rl.samples)
    if record:
      rows.append(('record of their routes, on the host', search.gib(record)))
  for axis, size in traffic.by_axis(config).items():
    if size:
      rows.append((f'received over {axis}', search.gib(size)))
  if mesh.stage > 1:
    rows.append(
      (
        'pipeline bubble',
        f"{bubble(mesh):.1%} of the MoE layers' time, in computing",
      )
    )
  return rows


def _headline(config) -> str:
  counts = cost.parameters(config)
  work = flops.train_flops_per_token(config, config.data.seq_len)
  cache = cost.cache_bytes_per_token(config)
  extra = f' + {_count(counts.mtp)} of MTP' if counts.mtp else ''
  return (
    f'{_count(counts.total)} parameters{extra}, {_count(counts.active)} '
    f'active; {_figure(work / 1e9)} GFLOP to train on a token of '
    f'{config.data.seq_len:,}; {cache:,} bytes of cache a token'
  )


def _money(bill, utilisation: float) -> str:
  return (
    f'{bill.tokens:,.4g} tokens: {_time(bill.days)}, {_figure(bill.hours)} '
    f'chip hours, ${_figure(bill.dollars)} at {utilisation:.1%} of the bf16 '
    'peak.'
  )


def _count(number: float) -> str:
  if number < 1e9:
    return f'{number / 1e6:,.2f} M'
  return f'{number / 1e9:,.2f} B'


def _figure(amount: float) -> str:
  """Returns three digits of a small amount, and the whole of a large one."""
  return f'{amount:,.0f}' if amount >= 100 else f'{amount:.3g}'


def _time(days: float) -> str:
  for unit, size in (('days', 1), ('hours', 24), ('minutes', 24 * 60)):
    if days * size >= 1:
      return f'{_figure(days * size)} {unit}'
  return f'{_figure(days * 24 * 3600)} seconds'


def _table(title: str, columns: tuple[str, ...]) -> Table:
  table = Table(
    title=title,
    box=box.SIMPLE_HEAD,
    title_justify='left',
    show_header=any(columns),
  )
  for i, name in enumerate(columns):
    text = name in ('', 'memory', 'slice', 'mesh', 'axis', 'kind') or i == 0
    table.add_column(
      name, justify='left' if text else 'right', no_wrap=name == 'mesh'
    )
  return table


def _gib(size: float) -> str:
  return f'{size / 2**30:,.1f}'
