"""Rates on a card, beside its own: `card`, `step`, `products`, `decode`.

A rate stands beside those of a large product and of a copy on the same card,
which part `card` measures, and beside the maker's data sheet. The last part,
`train`, is the run of `make train`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe import cost, fp8
from mla_moe.config import CacheConfig
from mla_moe.decode import latent_cache
from mla_moe.model import experts
from mla_moe.train import optim
from mla_moe.train.state import init_state

from .. import chips, commands, profile
from ..training import program
from . import (
  decode,
  layer,
  models,
  ours_decode,
  ours_train,
  show,
)
from .card_checks import (
  latent_attend,
  operands,
  with_gradients,
)

PLAIN, COPY = 'plain product, bfloat16', 'copy'
# V2-Lite's widths with six of its layers: 3.4 B parameters, 78 GiB to train.
LITE = models.Shape(
  vocab=102400,
  dim=2048,
  layers=6,
  dense_layers=1,
  dense_width=10944,
  heads=16,
  query_rank=0,
  kv_rank=512,
  nope_dim=128,
  rope_dim=64,
  value_dim=128,
  experts=64,
  top_k=6,
  groups=1,
  top_groups=1,
  shared=2,
  width=1408,
  batch=8,
  length=4096,
)
TOY = models.Shape(
  vocab=264, dim=32, layers=1, dense_layers=0, heads=2, query_rank=0,
  kv_rank=32, nope_dim=16, rope_dim=16, value_dim=16, experts=4, top_k=2,
  groups=1, top_groups=1, width=32, batch=2, length=32,
)  # fmt: skip
RECIPES = ('bf16', 'fp8_tensor', 'fp8_block')
# (K, N) of products of a V3 layer, for 8192 tokens.
DENSE = {
  'q_up': (1536, 24576),
  'out': (16384, 7168),
  'expert up': (7168, 2048),
  'expert down': (2048, 7168),
}


def seconds_of(run, *args, least: float = 0.3, in_flight: int = 1) -> float:
  """Returns the median wall-clock time of a call, for `least` seconds.

  `in_flight` calls are dispatched before the program waits: their results are
  in memory at the same time, and the cost of waiting is shared by them.
  """
  jax.block_until_ready(run(*args))
  times, end = [], time.perf_counter() + least
  while not times or time.perf_counter() < end:
    began = time.perf_counter()
    jax.block_until_ready([run(*args) for _ in range(in_flight)])
    times.append((time.perf_counter() - began) / in_flight)
  return float(np.median(times))


def chip() -> chips.Chip | None:
  """Returns the data sheet of the first device, None if there is none."""
  return chips.of_device(jax.devices()[0].device_kind)


def beside(rows, rate: float) -> str:
  """Returns a rate (FLOP/s) as parts of the card's own, and of its peak."""
  own, sheet = rows.value('card', PLAIN), chip()
  parts = [f'{rate / own / 1e12:.0%} of a plain product'] if own else []
  parts += [f'{rate / sheet.bf16:.1%} of the bfloat16 peak'] if sheet else []
  return ', '.join(parts)


def card(rows, toy: bool) -> None:
  """The rates of a large product and of a copy: the bounds of all others."""
  n, sheet = (256, None) if toy else (8192, chip())
  with rows.attempt(PLAIN):
    x = jnp.ones((n, n), jnp.bfloat16)
    rate = 2 * n**3 / seconds_of(jax.jit(jnp.matmul), x, x, in_flight=8)
    note = f'{rate / sheet.bf16:.0%} of the peak' if sheet else ''
    rows.add(PLAIN, rate / 1e12, 'TFLOP/s', note)
  with rows.attempt(COPY):
    rate = layer.copy_bandwidth(16 if toy else 4096)
    note = f'{rate / sheet.bandwidth:.0%} of the peak' if sheet else ''
    rows.add(COPY, rate / 1e9, 'GB/s', note)


def training_step(rows, toy: bool) -> None:
  """A step in bfloat16 and in FP8; of half the batch where memory ends."""
  for precision in ('bf16', 'fp8_block'):
    shape = TOY if toy else LITE
    while shape.batch:
      try:
        time_step(rows, shape, precision)
        break
      except Exception as error:
        rows.fail(f'step, {precision}, {shape.batch} rows', error)
        if 'RESOURCE_EXHAUSTED' not in str(error):
          break
      shape = dataclasses.replace(shape, batch=shape.batch // 2)


def time_step(rows, shape: models.Shape, precision: str) -> None:
  """Adds the median time of a training step and its MFU, after the first."""
  config = models.config(shape, 'bfloat16')
  model = dataclasses.replace(config.model, precision=precision)
  config = dataclasses.replace(config, model=model)
  run, batch = program.jitted_step(config, None), ours_train.batch(config)
  rates = optim.Rates(1e-4, 1e-3, 0.0)
  state = jax.jit(lambda key: init_state(key, config))(jax.random.key(0))
  times = []
  while len(times) < 2 or (len(times) < 12 and sum(times[1:]) < 12):
    began = time.perf_counter()
    state, values = run(state, batch, rates)
    loss = float(values['loss'])
    jax.block_until_ready(state)
    times.append(time.perf_counter() - began)
  step = float(np.median(times[1:]))
  tokens = shape.batch * shape.length
  rate = cost.train_flops_per_token(config, shape.length) * tokens / step
  peak = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)
  note = (
    f'{tokens / step:,.0f} tokens/s, MFU: {beside(rows, rate)}; loss '
    f'{loss:.3f}, {peak / 2**30:.0f} GiB at most, first step {times[0]:.0f} s'
  )
  figure = f'step, {precision}, {shape.batch} x {shape.length}'
  rows.add(figure, 1e3 * step, 'ms', note, bool(np.isfinite(loss)))
  with rows.attempt(f'trace, {precision}'):
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        state, values = run(state, batch, rates)
        jax.block_until_ready(state)
      operations = profile.operations(pathlib.Path(folder))
    rows.text(f'step-{precision}', profile.table(operations, 40))


def products(rows, toy: bool) -> None:
  """Rates of products by expert, then of dense ones, forward and backward."""
  for precision in ('bf16', 'fp8_block'):
    with rows.attempt(f'routed experts, {precision}'):
      time_experts(rows, TOY if toy else LITE, precision)
  count, tokens = (4, 64) if toy else (256, 8192)
  even = jnp.full((count,), tokens * 8 // count, jnp.int32)
  by_expert = lambda x, w, precision: fp8.ragged_dot(x, w, even, precision)
  for name in ('expert up', 'expert down'):
    k, n = (128, 256) if toy else DENSE[name]
    figure = f'{count} experts, {name}, fp8_block'
    with rows.attempt(figure):
      args = operands(tokens * 8, k, n, count)
      time_product(rows, figure, by_expert, args, 'fp8_block')
      del args  # gigabytes, before the next ones
  for name, (k, n) in DENSE.items():
    k, n = (128, 256) if toy else (k, n)
    for precision in RECIPES:
      with rows.attempt(f'{name}, {precision}'):
        args = operands(tokens, k, n)
        time_product(rows, f'{name}, {precision}', fp8.dot, args, precision)
    if toy:
      break


def time_product(rows, figure, product, args, precision) -> None:
  """Adds the rate of y, dx and dw of a product."""
  run = with_gradients(functools.partial(product, precision=precision))
  rate = 6 * args[0].size * args[1].shape[-1] / seconds_of(run, *args)
  rows.add(figure, rate / 1e12, 'TFLOP/s', beside(rows, rate))


def time_experts(rows, shape: models.Shape, precision: str) -> None:
  """Adds the rate of a layer's routed experts, with sorting and gathering."""
  tokens = shape.batch * shape.length // 2
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], (tokens, shape.dim), jnp.bfloat16)
  scores = jax.random.uniform(keys[1], (tokens, shape.experts))
  gates, chosen = jax.lax.top_k(scores, shape.top_k)
  lead = shape.experts, shape.dim
  w = (
    0.02 * jax.random.normal(keys[2], (*lead, 2, shape.width)),
    0.02 * jax.random.normal(keys[3], (lead[0], shape.width, shape.dim)),
  )
  copies = (None, None)
  if precision != 'bf16':  # quantised once, as a step does
    copies = tuple(fp8.Recipe(precision).weights(one, 1) for one in w)
  recipe = fp8.Recipe(precision).resolved()

  def feed_forward(x, w):
    pairs = zip(w, copies, strict=True)
    w = [fp8.Weight(one, copy) if copy else one for one, copy in pairs]
    return experts.feed_forward(x, gates, chosen, *w, recipe=recipe)

  taken = seconds_of(with_gradients(feed_forward), x, w, x)
  rate = 18 * tokens * shape.top_k * shape.dim * shape.width / taken
  figure = f'routed experts, {precision}'
  rows.add(figure, rate / 1e12, 'TFLOP/s', beside(rows, rate))


def decoding(rows, toy: bool) -> None:
  """Bytes a second that absorbed decoding reads, beside a copy's."""
  batch, context = (2, 64) if toy else (64, 8192)
  copy = rows.value('card', COPY)
  beside_copy = lambda rate: f'{rate / copy / 1e9:.0%} of a copy' * bool(copy)
  rank, rope_dim, page = (32, 16, 32) if toy else (512, 64, 64)
  for heads in (128, 16):
    with rows.attempt(f'absorbed kernel, {heads} heads'):
      size = batch * context // page, page, rank + rope_dim
      pages = jax.random.normal(jax.random.key(0), size, jnp.bfloat16)
      table = jax.random.permutation(jax.random.key(1), size[0])
      table = table.reshape(batch, -1).astype(jnp.int32)
      start = jnp.full(batch, context - 1, jnp.int32)
      q = jnp.full((batch, heads, size[-1]), 0.01, jnp.bfloat16)
      args, widths = (q, pages, table, start), dict(heads=heads, rank=rank)
      taken = seconds_of(latent_attend(widths), *args, in_flight=16)
      rate = pages.nbytes / taken
      note = f'{1e3 * taken:.3f} ms; {beside_copy(rate)}'
      rows.add(f'absorbed kernel, {heads} heads', rate / 1e9, 'GB/s', note)
  shape = dataclasses.replace(TOY if toy else LITE, batch=batch)
  for impl in ['xla'] + ['gpu'] * (jax.default_backend() == 'gpu'):
    with rows.attempt(f'decoding step, {impl}'):
      taken = time_decoding(shape, context, impl)
      rate = decode.step_bytes(shape, context, 'bfloat16') / taken
      note = (
        f'{1e3 * taken:.2f} ms, {batch / taken:,.0f} tokens/s; '
        f'{beside_copy(rate)}'
      )
      rows.add(f'decoding step, {impl}', rate / 1e9, 'GB/s', note)


def time_decoding(shape: models.Shape, context: int, impl: str) -> float:
  """Returns the seconds of one step of a whole model after `context` tokens."""
  model = models.config(shape, 'bfloat16').model
  weights = ours_decode.weights(model)
  cache_config = CacheConfig(impl=impl, dtype='bfloat16')
  cache = latent_cache.empty(model, shape.batch, context + 64, cache_config)
  lengths = jnp.full(shape.batch, context, jnp.int32)
  step = ours_decode.step_function(model)
  state = {'cache': cache, 'tokens': jnp.zeros(shape.batch, jnp.int32)}

  def once():
    cache = state['cache'].replace(lengths=jnp.copy(lengths))
    state['tokens'], state['cache'] = step(weights, cache, state['tokens'])
    return state['tokens']

  return seconds_of(once)


def make_train(rows, toy: bool, seconds: int) -> None:
  """The run of `make train`, stopped before `seconds` end."""
  name = 'tiny' + ':micro' * toy
  command = [*commands.program('train'), f'--config={name}']
  command += ['--config.run.steps=5'] * toy
  with tempfile.TemporaryDirectory() as folder:
    began = time.perf_counter()
    state = 'whole'
    try:
      subprocess.run(
        [*command, f'--workdir={folder}/run'],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=max(seconds - 8, 1),
      )
    except subprocess.TimeoutExpired:
      state = 'stopped by the clock'
    taken = time.perf_counter() - began
    file = pathlib.Path(folder, 'run', 'metrics.jsonl')
    text = file.read_text(encoding='utf-8')
  # Killed, a run may leave half a line.
  lines = [json.loads(line) for line in text.split('\n')[:-1]]
  last = {key: value for line in lines for key, value in line.items()}
  keys = 'step', 'loss', 'bits_per_byte', 'tokens_per_s'
  note = ', '.join(f'{k} {last[k]:,.4g}' for k in keys if k in last)
  rows.machine(show.machine())
  rows.add(f'{name}, {state}', taken, 's', note)
