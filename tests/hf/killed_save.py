"""Saves a small model, and is killed in a named moment of it.

  python tests/hf/killed_save.py MOMENT TARGET [force]

MOMENT is file (in the middle of the tensors), config (before the last rename)
or swap (as the folder of before is deleted).
"""

import os
import pathlib
import signal
import sys

import numpy as np

from mla_moe import config as c
from mla_moe.hf import names, outgoing, save


def die(*_, **__):
  os.kill(os.getpid(), signal.SIGKILL)


def main(moment, target, *force):
  mla = c.MLAConfig(heads=2, query_rank=0, kv_rank=8, nope_dim=8, rope_dim=4)
  sizes = dict(vocab=258, dim=64, layers=1, dense_layers=1, dense_width=32)
  config = c.ModelConfig(mla=mla, mtp=c.MTPConfig(0), **sizes)
  variables = {}
  for row in names.rows(config):
    tree = variables
    for key in row.path[:-1]:
      tree = tree.setdefault(key, {})
    tree[row.path[-1]] = np.ones(row.shape, np.float32)
  if moment == 'file':
    check = lambda name, _: 'o_proj' in name and die()
    outgoing.fp8_blocks.check_finite = check
  elif moment == 'config':
    save._replace = die
  elif moment == 'swap':
    save.shutil.rmtree = die
  save.save_huggingface(
    pathlib.Path(target), config, variables, force=bool(force)
  )


if __name__ == '__main__':
  main(*sys.argv[1:])
