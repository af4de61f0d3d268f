"""One of two processes that step, save at a signal, and compare replicas.

  python tests/programs/one_of_two.py RANK FOLDER [PLACE]

Two devices each. PLACE is that of the checkpoints, if it is not FOLDER. The
last six lines are the signal with its step; the files that this process
hashed; the step after it, whose save failed on the second process; the step
that is restored, and the refusal of a later one with a bit flipped; the leaf
whose copies differ after the second process's has drifted; the fingerprint of
a text, of which the second process reads nothing.
"""

import contextlib
import itertools
import os
import pathlib
import sys
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import faults
from experiments.checkpointing import (
  agreement,
  fingerprint,
  saving,
  seal,
  storage,
  store,
)
from experiments.data import sources, tokenizer
from experiments.training import signals, source
from mla_moe.config import freeze

WHOLE = np.arange(8, dtype=np.float32)
LARGE = np.arange(4096, dtype=np.float32)


def main(rank, folder, place=''):
  address = f'unix:{folder}/socket'  # no port that another program may have
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(address, 2, rank, coordinator_bind_address=address)
  mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ('data', 'fsdp'))

  def put(x, spec):
    where = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, where, lambda at: x[at])

  state = {'w': put(WHOLE, P('fsdp')), 'n': put(np.float32(0), P())}
  state['v'] = put(LARGE, P(('data', 'fsdp')))  # half is in each process
  hashed, place = watch(), place or folder
  step, state = steps(state, place)
  restored = store.restore(place, state)
  assert restored.step == step
  prints, apart = fingerprint.read(fingerprint.of(restored.state))
  assert not apart, apart
  assert prints == fingerprint.read(fingerprint.of(state))[0]
  print(*sorted(hashed), flush=True)
  fail(rank, place, state, step + 1)
  if rank:
    flip(storage.path(f'{place}/{step + 2}'))
  agreement.agree(next(agreement.turns), '', ''.join)  # after the flip
  lines = []
  restored = store.restore(place, state, say=lines.append)
  print(restored.step - step, *lines, flush=True)
  state['w'] = put((WHOLE + 1) if rank else WHOLE, P('fsdp'))
  print(*fingerprint.read(fingerprint.of(state))[1], flush=True)
  print(text(pathlib.Path(folder) / 'data', rank), flush=True)


def text(folder, rank):
  """Opens a text; process 1 cannot list it, and trusts process 0."""
  data = dict(source=str(folder / 'text'), seq_len=8, batch_size=2)
  if rank:
    sources.listed = None
  else:
    (folder / 'text').mkdir(parents=True)
    (folder / 'text' / 'a.txt').write_text('a line of text\n' * 99)
  words = tokenizer.load('byte')
  with contextlib.redirect_stdout(None):
    opened = source.open_text(freeze({'data': data}), words, folder / 'run')
  return opened.fingerprint


def watch():
  """The names of the files that this process hashes from here on."""
  records, hashed = seal.records, []

  def watched(*words):
    own = records(*words)
    hashed.extend(own)
    return own

  seal.records = watched
  return hashed


def fail(rank, folder, state, step):
  """Saves a step that the second process cannot write, and the next one."""
  with saving.Writer(folder, 3) as writer:
    if rank:
      os.environ[faults.VARIABLE] = f'full@during_write:{step}'
    writer.save(step, state, {})
    try:
      writer.wait()
      print('saved?', flush=True)
    except saving.NotSaved as error:
      print(error.step - step + 1, 'not saved', flush=True)
    os.environ.pop(faults.VARIABLE, None)
    writer.save(step + 1, state, {})


def flip(folder):
  """Flips a bit in the largest file of the second process."""
  objects = storage.is_bucket(folder) and storage.objects(folder)
  files = objects or seal.records(folder)
  own = [name for name in files if 'ocdbt.process_1/d/' in name]
  path = folder / max(own, key=lambda name: files[name][0])
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def steps(state, folder):
  """Steps until both have seen a signal; the step and state that are saved."""
  train = jax.jit(lambda s: s | {'w': s['w'] + 1, 'n': s['n'] + s['w'].sum()})
  with saving.Writer(folder, 3) as writer, signals.Stop() as stop:
    for step in itertools.count(1):
      shared = stop.share()
      state = train(state)
      name = signals.agreed(shared)
      if step == 5:
        print('ready', flush=True)
      if name:
        writer.save(step, state, {})
        print(name, step, flush=True)
        return step, state
      time.sleep(0.05)


if __name__ == '__main__':
  main(int(sys.argv[1]), *sys.argv[2:])
