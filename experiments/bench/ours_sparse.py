"""A forward pass of ours with sparse attention, in a process of its own.

Standard input has the sizes and the length, and the answer is a line with the
seconds of a pass, the versions, and the MiB that passes add to the memory of
the process, which has compiled its program (of Linux alone).
"""

from __future__ import annotations

import json
import pathlib
import sys
import time

import numpy as np

from . import sparse


def main() -> None:
  """The program; its peer is `peer_sparse`."""
  import jax

  job = json.loads(sys.stdin.readline())
  length = job.pop('length')
  net, variables = sparse._variables(
    sparse.model(sparse.Sizes(**job), 'sparse')
  )

  def logits(variables, tokens):
    hidden = net.apply(variables, tokens, method=net.features).hidden
    return hidden @ variables['params']['w_head']

  tokens = np.random.default_rng(0).integers(0, 256, (1, length))
  tokens = tokens.astype(np.int32)
  jax.block_until_ready(jax.jit(logits)(variables, tokens[:, :64]))
  run = jax.jit(logits).lower(variables, tokens).compile()
  clear = pathlib.Path('/proc/self/clear_refs')  # the peak is now
  clear.write_text('5', encoding='utf-8')
  before, seconds = _kib('VmRSS'), []
  for _ in range(3):
    began = time.perf_counter()
    jax.block_until_ready(run(variables, tokens))
    seconds.append(time.perf_counter() - began)
  answer = {'seconds': min(seconds), 'mib': (_kib('VmHWM') - before) / 1024}
  print(json.dumps(answer | {'versions': f'jax {jax.__version__}'}))


def _kib(field: str) -> int:
  """Returns a size of this process: VmRSS, or VmHWM, its peak."""
  status = pathlib.Path('/proc/self/status').read_text(encoding='utf-8')
  lines = status.splitlines()
  return int(next(x for x in lines if x.startswith(field)).split()[1])


if __name__ == '__main__':
  main()
