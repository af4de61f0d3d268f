"""docs/library.md runs; the library's seams reach every layer."""

import dataclasses
import functools
import json
import math
import pathlib
import re
import runpy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import tiny
from mla_moe import Functions, Transformer, fp8, init_state, sharding
from mla_moe.checkpoint import store
from mla_moe.config import ConfigError, MeshConfig, freeze
from mla_moe.model import attention, router, trace

ROOT = pathlib.Path(__file__).parent.parent
MICRO = freeze(tiny.get_config('micro'))
PAGE = (ROOT / 'docs' / 'library.md').read_text()


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  """The names that the blocks of the page define, run as one program."""
  folder = tmp_path_factory.mktemp('library')
  run = folder / 'runs' / 'tiny'
  run.mkdir(parents=True)
  (run / 'config.json').write_text(json.dumps(dataclasses.asdict(MICRO)))
  state = init_state(jax.random.key(0), MICRO)
  with store.Writer(run / 'checkpoints', keep=1) as writer:
    writer.save(3, state, {})
  blocks = re.findall(r'```python\n(.*?)```', PAGE, re.S)
  assert len(blocks) >= 9
  (folder / 'page.py').write_text('\n\n'.join(blocks))
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    names = runpy.run_path('page.py')
  return names | {'saved': state}


def test_the_page_runs(page):
  assert page['same'] == dataclasses.replace(
    page['model'], compute=page['same'].compute
  )
  assert page['run'] == MICRO
  chex.assert_trees_all_equal(page['trained']['params'], page['saved'].params)
  chex.assert_trees_all_equal(page['trained']['router'], page['saved'].router)
