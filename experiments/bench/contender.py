"""Our side of the training benchmark, and how a contender is driven.

A contender is a program that reads one line with its job, warms up, answers
with its versions, and then answers each line with the seconds of one whole
training step. So contenders take turns on one machine, each in a process of its
own, and every ratio comes from the same minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
import time

import numpy as np

from experiments import runtime
from experiments.bench import shape as shapes


class Contender:
  """A running contender; `seconds` collects its steps.

  `versions` is None where it did not start.
  """

  def __init__(self, command: list[str], shape: shapes.Shape, mode: str):
    self.seconds = []
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    job = {'shape': dataclasses.asdict(shape), 'mode': mode}
    self.versions = self._ask(json.dumps(job))
    if self.versions is None:
      self.stop()

  def _ask(self, line: str):
    try:
      self._process.stdin.write(line + '\n')
      self._process.stdin.flush()
      answer = self._process.stdout.readline()
    except BrokenPipeError:
      answer = ''
    return json.loads(answer) if answer else None

  def step(self) -> None:
    """One step more."""
    self.seconds.append(self._ask('step'))

  def stop(self) -> None:
    """Ends the process: its input ends."""
    with contextlib.suppress(BrokenPipeError):
      self._process.communicate(timeout=60)


def ours(shape: shapes.Shape, dtype: str) -> Contender:
  """This framework at `shape`, with activations of `dtype`."""
  module = [sys.executable, '-m', 'experiments.bench.contender']
  return Contender(module, shape, dtype)


def take_turns(contenders: dict[str, Contender], rounds: int) -> None:
  """`rounds` steps of each, one by one; then all end.

  The pause is for threads that spin a while after their last work, as OpenMP's
  do: they would take the next one's cores.
  """
  for _ in range(rounds):
    for contender in contenders.values():
      time.sleep(0.5)
      contender.step()
  for contender in contenders.values():
    contender.stop()


def batch(config, seed: int = 0):
  """A device batch of random tokens, one micro-batch."""
  import jax

  from mla_moe.data import batches

  draw = np.random.default_rng(seed)
  size = (1, config.data.batch_size, config.data.seq_len + 1)
  tokens = draw.integers(0, config.model.vocab, size).astype(np.int32)
  places = np.arange(config.data.seq_len, dtype=np.int32)
  inputs, targets = tokens[..., :-1], tokens[..., 1:]
  return jax.device_put(
    batches.Batch(
      tokens=inputs,
      targets=targets,
      segments=np.zeros_like(inputs),
      positions=np.broadcast_to(places, inputs.shape),
      count=np.int32(1),
    )
  )


def step_function(config):
  """The jitted training step, as the training loop builds it."""
  import jax

  from mla_moe.train import step

  run = functools.partial(step.train_step, config=config)
  options = runtime.step_options()
  return jax.jit(run, donate_argnums=0, compiler_options=options)


def main() -> None:
  """The program of `ours`."""
  import jax

  from mla_moe.train import optim
  from mla_moe.train.state import init_state

  job = json.loads(sys.stdin.readline())
  config = shapes.config(shapes.Shape(**job['shape']), job['mode'])
  runtime.keep_memory()
  run, tokens = step_function(config), batch(config)
  rates = optim.Rates(1e-4, 1e-3, 0.0)
  state = init_state(jax.random.key(0), config)

  for _ in range(2):
    state, values = jax.block_until_ready(run(state, tokens, rates))
  print(json.dumps(f'jax {jax.__version__}'), flush=True)
  for _ in sys.stdin:
    began = time.perf_counter()
    state, values = run(state, tokens, rates)
    float(values['loss'])
    jax.block_until_ready(state)
    print(json.dumps(time.perf_counter() - began), flush=True)


if __name__ == '__main__':
  main()
