"""One answer for all processes, through jax's key-value store on process 0.

Each process contributes a text, process 0 makes the answer of all texts, and
everybody gets it. No device takes part, unlike in a collective: a thread may
do this beside training. If a process dies, jax's coordinator ends the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
from orbax.checkpoint import multihost

_PATIENCE = 7 * 86_400_000  # milliseconds; the coordinator sees a death earlier
# The number of an agreement; all processes must draw them in the same order.
turns = itertools.count()


def agree(turn: int, text: str, answer: Callable[[list[str]], str]) -> str:
  """Returns `answer(texts)` of process 0, on every process.

  Args:
    turn: one of `turns`, the same on every process.
    text: this process's.
    answer: makes the answer of all texts, in the order of the processes.
  """
  if jax.process_count() == 1:
    return answer([text])
  client = multihost.get_jax_distributed_client()
  get = lambda name: client.blocking_key_value_get(f'{key}/{name}', _PATIENCE)
  key = f'mla_moe/{turn}'
  client.key_value_set(f'{key}/{jax.process_index()}', f' {text}')
  if jax.process_index() == 0:
    texts = [get(i)[1:] for i in range(jax.process_count())]
    client.key_value_set(f'{key}/answer', f' {answer(texts)}')
  return get('answer')[1:]
