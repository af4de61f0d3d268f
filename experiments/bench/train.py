"""The training benchmark: speed beside a peer, memory, experts, compile time.

The peer is transformers' DeepSeek-V3 (grouped experts; plain, compiled, and in
bfloat16), at one shape and in turns with ours. Two other frameworks were timed
here once: they are quoted as a fraction of transformers' speed at that time.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from mla_moe import cost

from .. import commands, page
from . import contender, models, ours_train, products, show

_DTYPES = ('float32', 'bfloat16')
_PEERS = ('float32', 'float32 compile', 'bf16 autocast')
# tokens/s measured side by side once on two cores, with transformers 5.23
# (grouped experts, float32) at 2730: MaxText 0.2.5's best form, EasyDeL 0.3.0.
_OTHERS = {'MaxText 0.2.5': 732 / 2730, 'EasyDeL 0.3.0': 438 / 2730}

_LENGTHS = (512, 1024, 2048, 4096, 8192)
_EXPERTS = (16, 64, 256)
_LAYERS = (2, 4, 8, 16)


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  parser.add_argument('--only', default='', help='parts, joined by commas')
  parser.add_argument('--rounds', type=int, default=7, help='turns of each')
  parser.add_argument(
    '--peer_python',
    default=sys.executable,
    help='a Python with torch and transformers',
  )


def run(out: pathlib.Path, args) -> None:
  """Measures the parts of `args.only`, prints them, writes OUT/train.html."""
  parts = {
    'speed': lambda: _speed(args.peer_python, args.rounds),
    'products': _products,
    'length': _memory_by_length,
    'experts': lambda: _by_experts(args.rounds),
    'layers': _compile_by_layers,
    'start': _second_start,
  }
  results = show.measure(out / 'train.json', parts, args.only)
  show.results(
    out,
    'train',
    'Training benchmark',
    rows(results),
    show.machines(results),
    lambda: draw(results),
  )


# ------------------------------------------------------------------- measuring


def _speed(python: str, rounds: int) -> dict:
  shape = models.Shape()
  ours = functools.partial(contender.ours, 'ours_train', shape)
  peer = functools.partial(contender.peer, python, 'peer_train', shape)
  racers = {f'mla_moe {dtype}': ours(dtype) for dtype in _DTYPES}
  racers |= {f'transformers {mode}': peer(mode) for mode in _PEERS}
  racers = contender.started(racers)
  contender.take_turns(racers, rounds)
  tokens = shape.batch * shape.length
  return {
    name: {
      'tokens_per_s': tokens / np.median(racer.seconds),
      'slowest': tokens / max(racer.seconds),
      'fastest': tokens / min(racer.seconds),
      'versions': racer.versions,
    }
    for name, racer in racers.items()
  }


def _products() -> dict:
  """Returns the rates (FLOP/s) of a step and of its products run alone.

  The steps surround the products: both drift with the machine.
  """
  shape = models.Shape()
  racer = contender.ours('ours_train', shape, 'float32')
  racer.step()
  rates = products.rates(shape)
  for _ in range(4):
    racer.step()
  racer.stop()
  work = cost.train_flops_per_token(models.config(shape), shape.length)
  work *= shape.batch * shape.length
  step_rate = work / np.median(racer.seconds)
  products_rate = products.together(rates)
  return {
    'flops_per_step': work,
    'step_rate': step_rate,
    'products_rate': products_rate,
    'fraction': step_rate / products_rate,
    'widest': max(rate for _, rate in rates),
    'each': {product.name: rate for product, rate in rates},
  }


def _compiled(shape: models.Shape):
  """Returns the compiled step at a shape, and the seconds it took."""
  import jax

  from mla_moe.train import optim
  from mla_moe.train.state import init_state

  from ..training import program

  config = models.config(shape)
  state = jax.eval_shape(lambda: init_state(jax.random.key(0), config))
  run, batch = program.jitted_step(config, None), ours_train.batch(config)
  began = time.perf_counter()
  program = run.lower(state, batch, optim.Rates(1.0, 1.0, 0.0)).compile()
  return program, time.perf_counter() - began


def _scratch(shape: models.Shape) -> float:
  """Returns MiB that a step needs beyond its state and its batch."""
  return _compiled(shape)[0].memory_analysis().temp_size_in_bytes / 2**20


def _memory_by_length() -> dict:
  longer = functools.partial(dataclasses.replace, models.Shape(), batch=1)
  return {length: _scratch(longer(length=length)) for length in _LENGTHS}


def _by_experts(rounds: int) -> dict:
  """Returns, by experts, MiB of scratch and of parameters, seconds a step."""
  larger = functools.partial(dataclasses.replace, models.Shape(), batch=16)
  shapes = {count: larger(experts=count) for count in _EXPERTS}
  racers = {
    count: contender.ours('ours_train', shape, 'float32')
    for count, shape in shapes.items()
  }
  contender.take_turns(racers, rounds)
  figures = {}
  for count, shape in shapes.items():
    parameters = cost.parameters(models.config(shape)).total * 4 / 2**20
    seconds = float(np.median(racers[count].seconds))
    figures[count] = _scratch(shape), parameters, seconds
  return figures


def _compile_by_layers() -> dict:
  deeper = functools.partial(dataclasses.replace, models.Shape())
  return {count: _compiled(deeper(layers=count))[1] for count in _LAYERS}


def _second_start() -> dict:
  """Returns seconds of a process that trains one step: the first, the next."""
  seconds = {}
  with tempfile.TemporaryDirectory() as folder:
    for name in ('first', 'second'):
      command = [
        *commands.program('train'),
        *('--config=tiny', '--config.run.steps=1'),
        f'--workdir={folder}/{name}',
      ]
      began = time.perf_counter()
      subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
      seconds[name] = time.perf_counter() - began
  return seconds


# --------------------------------------------------------------------- showing


def rows(results: dict) -> list[tuple[str, str, str]]:
  """Returns (figure, its value, a figure to compare it with), in order."""
  rows_of = {
    'speed': _speed_rows,
    'products': _product_rows,
    'length': _length_rows,
    'experts': _expert_rows,
    'layers': _layer_rows,
    'start': _start_rows,
  }
  parts = [name for name in rows_of if name in results]
  return [r for name in parts for r in rows_of[name](results[name]['figures'])]


def _speed_rows(speed):
  base = speed['mla_moe float32']['tokens_per_s']
  for name, one in speed.items():
    spread = f'{one["slowest"]:,.0f} to {one["fastest"]:,.0f}'
    ratio = f'ours in float32 is {base / one["tokens_per_s"]:.2f} x'
    yield name, f'{one["tokens_per_s"]:,.0f} tokens/s', f'{spread}; {ratio}'
  plain = speed.get('transformers float32')
  for name, fraction in _OTHERS.items() if plain else ():
    rate = fraction * plain['tokens_per_s']
    note = f'{fraction:.2f} of transformers, measured before; ours is '
    yield name, f'{rate:,.0f} tokens/s', f'{note}{base / rate:.1f} x'


def _product_rows(p):
  note = (
    f'{p["fraction"]:.0%} of its own products run alone '
    f'({p["products_rate"] / 1e9:.0f}); the widest one reaches '
    f'{p["widest"] / 1e9:.0f}'
  )
  yield 'rate of a step', f'{p["step_rate"] / 1e9:.0f} GFLOP/s', note


def _length_rows(by_length):
  (short, low), *_, (long, high) = by_length.items()
  note = f'{high / low:.1f} x for {int(long) / int(short):.0f} x'
  figure = f'scratch memory, {short} to {long} tokens'
  yield figure, f'{low:.0f} to {high:.0f} MiB', note


def _expert_rows(by_experts):
  first = next(iter(by_experts))
  for e, (scratch, parameters, seconds) in by_experts.items():
    note = f'parameters {parameters:.0f} MiB'
    yield f'scratch memory, {e} experts', f'{scratch:.0f} MiB', note
    ratio = f'{seconds / by_experts[first][2]:.2f} x that of {first}'
    yield f'step, {e} experts', f'{seconds:.2f} s', ratio


def _layer_rows(layers):
  first = next(iter(layers))
  for n, seconds in layers.items():
    ratio = f'{seconds / layers[first]:.2f} x that of {first}'
    yield f'compiling {n} layers', f'{seconds:.1f} s', ratio


def _start_rows(start):
  yield 'start, train one step, end', f'{start["first"]:.1f} s', 'first time'
  ratio = f'{start["second"] / start["first"]:.2f} of the first'
  yield 'the same again', f'{start["second"]:.1f} s', ratio


def draw(results: dict):
  """Returns a figure with a plot of each part that has one, or None."""
  plots = {
    'speed': _speed_plot,
    'length': _length_plot,
    'experts': _experts_plot,
    'layers': _layers_plot,
  }
  parts = [name for name in plots if name in results]
  if not parts:
    return None
  figure, axes = page.figure(2, lines=-(-len(parts) // 2), height=3.2)
  for plot in axes.flat[len(parts) :]:
    plot.set_axis_off()
  for name, plot in zip(parts, axes.flat, strict=False):
    plots[name](plot, results[name]['figures'])
  return figure


def _speed_plot(plot, speed):
  rates = [one['tokens_per_s'] for one in speed.values()]
  plot.barh(list(speed), rates, color=page.COLOURS[0])
  plot.invert_yaxis()
  plot.set(title="Training at the peers' shape", xlabel='tokens/s')


def _length_plot(plot, memory):
  lengths = [int(t) for t in memory]
  values = list(memory.values())
  plot.loglog(lengths, values, 'o-', base=2, label='measured')
  line = [values[0] * t / lengths[0] for t in lengths]
  plot.loglog(lengths, line, ':', base=2, label='linear')
  plot.set(title='Memory of a step', xlabel='tokens in a row', ylabel='MiB')
  plot.legend(frameon=False)


def _experts_plot(plot, by_experts):
  seconds = [one[2] for one in by_experts.values()]
  plot.plot([str(e) for e in by_experts], seconds, 'o-')
  plot.set(title='Same active parameters', xlabel='experts', ylabel='s a step')
  plot.set_ylim(0, None)


def _layers_plot(plot, layers):
  plot.plot([str(n) for n in layers], list(layers.values()), 'o-')
  plot.set(title='Compiling', xlabel='layers', ylabel='s')
  plot.set_ylim(0, None)
