"""The training benchmark: speed beside a peer, memory, experts, compile time.

Speed is compared at one shape with transformers' DeepSeek-V3 (grouped experts,
plain, compiled, and in bfloat16), by turns. What other frameworks reached here
before is quoted as their share of transformers' speed in the same session.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np

from experiments import page
from experiments.bench import contender, products
from experiments.bench import shape as shapes
from mla_moe import cost
from mla_moe.config import ConfigError

# tokens/s measured side by side once on two cores, with transformers 5.23
# (grouped experts, float32) at 2730: MaxText 0.2.5's best form, EasyDeL 0.3.0.
_OTHERS = {'MaxText 0.2.5': 732 / 2730, 'EasyDeL 0.3.0': 438 / 2730}

_LENGTHS = (512, 1024, 2048, 4096, 8192)
_EXPERTS = (16, 64, 256)
_LAYERS = (2, 4, 8, 16)


def run(out: pathlib.Path, args) -> None:
  """Measures what `args.only` names (all: everything), prints, writes a page.

  OUT/train.json keeps what was measured before.
  """
  measures = {
    'speed': lambda: _speed(args.peer_python, args.rounds),
    'products': _products,
    'length': _memory_by_length,
    'experts': lambda: _by_experts(args.rounds),
    'layers': _compile_by_layers,
    'start': _second_start,
  }
  chosen = args.only.split(',') if args.only else list(measures)
  for name in chosen:
    if name not in measures:
      raise ConfigError(f'--only={name}: there is only {", ".join(measures)}')
  kept = out / 'train.json'
  found = json.loads(kept.read_text()) if kept.exists() else {}
  for name in chosen:
    began = time.perf_counter()
    print(f'measuring {name} ...', end=' ', flush=True)
    found[name] = {'machine': machine(), 'found': measures[name]()}
    print(f'{time.perf_counter() - began:.0f} s')
    kept.write_text(json.dumps(found, indent=1))
  _print(found)
  with contextlib.suppress(ImportError):
    (out / 'train.html').write_text(_page(found))
    print(f'Results: {out / "train.html"} and train.json.')


def machine() -> dict:
  """What the figures were measured on."""
  import jax
  import jaxlib

  cpu = platform.processor() or platform.machine()
  with contextlib.suppress(OSError):
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    names = [x.split(':')[1].strip() for x in lines if x.startswith('model n')]
    cpu = names[0] if names else cpu
  return {
    'date': datetime.date.today().isoformat(),
    'device': jax.devices()[0].device_kind,
    'cpu': cpu,
    'cores': os.cpu_count(),
    'python': platform.python_version(),
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
  }


def _speed(peer_python: str, rounds: int) -> dict:
  shape = shapes.Shape()
  peer = [
    peer_python,
    str(pathlib.Path(__file__).parent / 'peer_transformers.py'),
  ]
  racers = {
    'mla_moe float32': contender.ours(shape, 'float32'),
    'mla_moe bfloat16': contender.ours(shape, 'bfloat16'),
  }
  for mode in ('float32', 'float32 compile', 'bf16 autocast'):
    racers[f'transformers {mode}'] = contender.Contender(peer, shape, mode)
  absent = [name for name, racer in racers.items() if not racer.versions]
  for name in absent:
    print(f'  left out: {name} (did not start; needs torch, transformers)')
    racers.pop(name)
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
  """In turns with the step, for both drift with the machine."""
  shape = shapes.Shape()
  racer = contender.ours(shape, 'float32')
  racer.step()
  found = products.rates(shape)
  for _ in range(4):
    racer.step()
  racer.stop()
  config = shapes.config(shape)
  work = cost.train_flops_per_token(config, shape.length)
  work *= shape.batch * shape.length
  reached = work / np.median(racer.seconds)
  alone = products.together(found)
  return {
    'flops_per_step': work,
    'step_rate': reached,
    'products_rate': alone,
    'share': reached / alone,
    'widest': max(rate for _, rate in found),
    'each': {p.name: rate for p, rate in found},
  }


def _compiled(shape: shapes.Shape):
  """The compiled step at a shape, and the seconds that took."""
  import jax

  from mla_moe.train import optim
  from mla_moe.train.state import init_state

  config = shapes.config(shape)
  state = jax.eval_shape(lambda: init_state(jax.random.key(0), config))
  run = contender.step_function(config)
  began = time.perf_counter()
  lowered = run.lower(
    state, contender.batch(config), optim.Rates(1.0, 1.0, 0.0)
  )
  done = lowered.compile()
  return done, time.perf_counter() - began


def _scratch(shape: shapes.Shape) -> tuple[float, float]:
  """MiB of a step beyond its state, and MiB of float32 parameters."""
  stats = _compiled(shape)[0].memory_analysis()
  counts = cost.parameters(shapes.config(shape))
  return stats.temp_size_in_bytes / 2**20, counts.total * 4 / 2**20


def _memory_by_length() -> dict:
  shape = dataclasses.replace(shapes.Shape(), batch=1)
  longer = lambda t: dataclasses.replace(shape, length=t)
  return {t: _scratch(longer(t))[0] for t in _LENGTHS}


def _with_experts(count: int) -> shapes.Shape:
  return dataclasses.replace(shapes.Shape(), experts=count, batch=16)


def _by_experts(rounds: int) -> dict:
  """By experts: scratch and parameters in MiB, seconds of a step."""
  racers = {e: contender.ours(_with_experts(e), 'float32') for e in _EXPERTS}
  contender.take_turns(racers, rounds)
  seconds = {e: float(np.median(racer.seconds)) for e, racer in racers.items()}
  return {e: (*_scratch(_with_experts(e)), seconds[e]) for e in _EXPERTS}


def _compile_by_layers() -> dict:
  deep = lambda n: dataclasses.replace(shapes.Shape(), layers=n)
  return {n: _compiled(deep(n))[1] for n in _LAYERS}


def _second_start() -> dict:
  """Seconds of a whole process that trains one step, first and again."""
  taken = []
  with tempfile.TemporaryDirectory() as folder:
    for name in ('first', 'second'):
      command = [
        sys.executable,
        '-m',
        'experiments.train',
        '--config=configs/tiny.py',
        '--config.run.steps=1',
        f'--workdir={folder}/{name}',
      ]
      began = time.perf_counter()
      subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
      taken.append(time.perf_counter() - began)
  return {'first': taken[0], 'second': taken[1]}


def _rows(found: dict) -> list[tuple[str, str, str]]:
  """(what, value, beside what it is to be seen) of every figure."""
  rows = []
  for name, rows_of in (
    ('speed', _speed_rows),
    ('products', _product_rows),
    ('length', _length_rows),
    ('experts', _expert_rows),
    ('layers', _layer_rows),
    ('start', _start_rows),
  ):
    if name in found:
      rows += rows_of(found[name]['found'])
  return rows


def _speed_rows(speed):
  base = speed['mla_moe float32']['tokens_per_s']
  for name, one in speed.items():
    spread = f'{one["slowest"]:,.0f} to {one["fastest"]:,.0f}'
    ratio = f'ours in float32 is {base / one["tokens_per_s"]:.2f} x'
    yield name, f'{one["tokens_per_s"]:,.0f} tokens/s', f'{spread}; {ratio}'
  plain = speed.get('transformers float32')
  for name, share in _OTHERS.items() if plain else ():
    rate = share * plain['tokens_per_s']
    note = f'{share:.2f} of transformers, measured before; ours is '
    yield name, f'{rate:,.0f} tokens/s', f'{note}{base / rate:.1f} x'


def _product_rows(p):
  note = (
    f'{p["share"]:.0%} of its own products run alone '
    f'({p["products_rate"] / 1e9:.0f}); the widest one reaches '
    f'{p["widest"] / 1e9:.0f}'
  )
  yield 'rate of a step', f'{p["step_rate"] / 1e9:.0f} GFLOP/s', note


def _length_rows(by_length):
  (short, low), *_, (long, high) = by_length.items()
  note = f'{high / low:.1f} x for {int(long) / int(short):.0f} x'
  what = f'scratch memory, {short} to {long} tokens'
  yield what, f'{low:.0f} to {high:.0f} MiB', note


def _expert_rows(by_experts):
  first = next(iter(by_experts))
  for e, (scratch, held, seconds) in by_experts.items():
    note = f'parameters {held:.0f} MiB'
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


def _print(found: dict) -> None:
  from rich import console, table

  shown = table.Table('what', 'measured', 'beside', title='Training')
  for row in _rows(found):
    shown.add_row(*row)
  console.Console(width=110).print(shown)
  for machine in machines(found):
    print(machine)


def machines(found: dict) -> list[str]:
  """The machines that the figures come from, in words; most often one."""
  lines = [
    ', '.join(f'{name} {value}' for name, value in one['machine'].items())
    for one in found.values()
  ]
  return list(dict.fromkeys(lines))


def _page(found: dict) -> str:
  import matplotlib

  matplotlib.use('Agg')
  parts = []
  pictures = {
    'speed': _speed_picture,
    'length': _length_picture,
    'experts': _experts_picture,
    'layers': _layers_picture,
  }
  drawn = [name for name in pictures if name in found]
  if drawn:
    lines = -(-len(drawn) // 2)
    figure, axes = page.figure(2, lines=lines, height=3.2)
    for plot in axes.flat[len(drawn) :]:
      plot.set_axis_off()
    for name, plot in zip(drawn, axes.flat, strict=False):
      pictures[name](plot, found[name]['found'])
    parts.append(page.svg(figure))
  body = ''.join(
    f'<tr><td>{a}</td><td>{b}</td><td>{c}</td></tr>' for a, b, c in _rows(found)
  )
  parts.append(f'<table>{body}</table>')
  parts += [f'<p>{machine}</p>' for machine in machines(found)]
  return page.page('Training benchmark', parts)


def _speed_picture(plot, speed):
  rates = [one['tokens_per_s'] for one in speed.values()]
  plot.barh(list(speed), rates, color=page.COLOURS[0])
  plot.invert_yaxis()
  plot.set(title="Training at the peers' shape", xlabel='tokens/s')


def _length_picture(plot, memory):
  lengths = [int(t) for t in memory]
  values = list(memory.values())
  plot.loglog(lengths, values, 'o-', base=2, label='measured')
  line = [values[0] * t / lengths[0] for t in lengths]
  plot.loglog(lengths, line, ':', base=2, label='linear')
  plot.set(title='Memory of a step', xlabel='tokens in a row', ylabel='MiB')
  plot.legend(frameon=False)


def _experts_picture(plot, by_experts):
  seconds = [one[2] for one in by_experts.values()]
  plot.plot([str(e) for e in by_experts], seconds, 'o-')
  plot.set(title='Same active parameters', xlabel='experts', ylabel='s a step')
  plot.set_ylim(0, None)


def _layers_picture(plot, layers):
  plot.plot([str(n) for n in layers], list(layers.values()), 'o-')
  plot.set(title='Compiling', xlabel='layers', ylabel='s')
  plot.set_ylim(0, None)
