"""Releases to runs and back, training on from them, and text from both."""

import json
import math
import pathlib
import re
import shutil

import children
import jax
import numpy as np
import pytest
from releases import GOLDEN, same_bytes, tensors

from experiments.data import batches, corpus, tokenizer
from mla_moe import Transformer, load_huggingface
from mla_moe.config import freeze

# Warnings of third-party code in the programs are not ours to mend.
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('default'),
  pytest.mark.usefixtures('no_pictures'),
]


COMPUTE = ('remat=full', 'attention=reference', 'exchange=padded')


def program(name, *words):
  return children.run('-m', f'experiments.{name}', *words)


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """(a release, the run that was made of it)."""
  root = tmp_path_factory.mktemp('imported')
  source = root / 'release'
  shutil.copytree(GOLDEN / 'v3_release', source)
  values = json.loads((source / 'config.json').read_text())
  values |= {'bos_token_id': 256, 'eos_token_id': 257}  # the byte tokenizer's
  (source / 'config.json').write_text(json.dumps(values))
  settings = '{"eos_token_id": [1], "temperature": 0.6}'
  (source / 'generation_config.json').write_text(settings)
  words = ['--config=configs/tiny.py:smoke', '--config.data.fim_rate=0.0']
  words += ['--config.optim.optimizer=adamw', '--config.data.seq_len=32']
  words += [f'--config.model.compute.{x}' for x in COMPUTE]
  words = [f'--source={source}', f'--target={root}/run', *words]
  out = program('convert', *words)
  assert out.returncode == 0, out.stderr
  again = program('convert', *words)
  assert again.returncode == 2 and len(again.stderr.splitlines()) == 1
  config = json.loads((root / 'run/config.json').read_text())
  compute = config['model']['compute'].items()
  assert {f'{key}={value}' for key, value in compute} >= set(COMPUTE)
  return source, root / 'run'


def test_release_to_run_and_back_is_exact(imported, tmp_path, call):
  source, run = imported
  words = f'--source={run}', f'--target={tmp_path}/back', '--fp8'
  code, _, errors = call('convert', *words)
  assert code == 0, errors
  same_bytes(tensors(source), tensors(tmp_path / 'back'))
  name = 'generation_config.json'
  settings = (tmp_path / 'back' / name).read_text()
  assert settings == (source / name).read_text()


def test_release_and_run_say_the_same(imported, call):
  texts = []
  for folder in imported:
    words = [f'--checkpoint={folder}', '--prompt=hi', '--max_new_tokens=6']
    code, text, errors = call('generate', *words, '--tokenizer=byte')
    assert code == 0, errors
    texts.append(text)
  assert texts[0] == texts[1] != ''


def test_training_goes_on_from_a_release(imported, tmp_path, call):
  """The first step's loss equals the release's on the first batch."""
  source, original = imported
  run = tmp_path / 'run'
  shutil.copytree(original, run)
  text = (run / 'config.py').read_text()
  assert 'DIR/config.py' in text  # its command
  words = [f'--config={run}/config.py', f'--workdir={run}']
  quick = ('steps=3', 'eval_every=0', 'sample_every=0', 'save_every=0')
  code, shown, errors = call(
    'train', *words, *(f'--config.run.{x}' for x in quick)
  )
  assert code == 0, errors
  assert re.search('Resuming .* at step 0', shown)
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  losses = {
    row['step']: row['main_loss']
    for row in map(json.loads, lines)
    if 'main_loss' in row
  }
  assert sorted(losses) == [1, 2, 3] and losses[3] < losses[1]

  config = freeze(json.loads((run / 'config.json').read_text()))
  model, variables = load_huggingface(source, config.model.dtype)
  byte = tokenizer.load('byte', model.bos_id, model.eos_id)
  text = corpus.prepare(config.data, byte, pathlib.Path(tmp_path / 'corpus'))
  first = batches.batch_at(text.train, config.data, 0, text.bos_id)
  tokens, targets = first.tokens[0], np.asarray(first.targets[0])
  logits = jax.jit(Transformer(model).apply)(variables, tokens).logits
  log_probs = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)),
    np.maximum(targets, 0)[..., None],
    axis=-1,
  )[..., 0]
  nll = -log_probs[targets >= 0].mean()
  assert math.isclose(nll, losses[1], rel_tol=1e-4)
