"""A release of each family through the programs, from its files to its files.

The right values are the network's own without a cache: the tokens of greedy
decoding, and the loss of the examples in the first step of tuning. V3, with FP8
and an MTP layer, goes the same way in tests/hf/test_convert.py.
"""

import asyncio
import dataclasses
import json
import pathlib
import shutil

import asgi
import chex
import jax
import numpy as np
import pytest

from experiments import opened
from experiments.checkpointing.load import load_run
from experiments.data import tokenizer
from experiments.serving import endpoint, scheduler
from experiments.serving.engine import Engine
from experiments.training import examples
from mla_moe import CacheConfig, Transformer, load_huggingface
from mla_moe.hf import dialects, safetensors

pytestmark = [
  pytest.mark.filterwarnings('default'),
  pytest.mark.usefixtures('no_pictures'),
]

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
LENGTH, PROMPT, COUNT = 32, '%-7Ab', 6
ROWS = (('ab', '%%-'), ('+7', 'AB8'), ("x'", '(1'))
SHORT = (
  *('model.compute.remat=none', 'optim.optimizer=adamw', 'data.batch_size=1'),
  *(f'data.seq_len={LENGTH}', 'run.steps=2', 'run.log_every=1'),
  *(f'run.{chore}_every=0' for chore in ('eval', 'sample', 'save', 'check')),
)

# Four networks: greedy softmax, groups by their two best, sigmoid, dense.
FAMILIES = {'deepseek_v2': 'v2_lite'} | {
  name: f'families/{name}' for name in ('mistral4', 'glm4_moe_lite', 'youtu')
}
# The same networks but for YaRN, with tensors or keys of other names.
ALIKE = {
  'mistral_large_3': 'families/large3',
  'sarvam_mla': 'families/sarvam_mla',
}
# The words of other families for a golden network. The last is the model type
# of the text within a model that sees.
OTHERS = {
  'kimi_k25': ('families/glm4_moe_lite', 'kimi_k2'),
  'joyai_llm_flash': ('families/glm4_moe_lite', ''),
  'mistral3': ('families/mistral4', 'mistral4'),
}


def tensors(folder):
  """Returns {name: array} of a folder."""
  arrays = {}
  for path in sorted(folder.glob('*.safetensors')):
    with safetensors.File(path) as file:
      arrays |= {name: np.array(file.read(name)) for name in file.entries}
  return arrays


def write_tokenizer(folder, model):
  """Gives each id of the model a token, of one or two characters."""
  letters = [chr(i) for i in range(ord('!'), ord('~') + 1)]
  texts = iter([*letters, *(a + b for a in letters for b in letters)])
  ends = {model.bos_id: '<s>', model.eos_id: '</s>'}
  vocab = {ends.get(i) or next(texts): i for i in range(model.vocab)}
  flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
  level = dict(type='ByteLevel', add_prefix_space=False, use_regex=False)
  values = {
    'version': '1.0',
    'added_tokens': [
      {'id': i, 'content': text, **flags, 'special': True}
      for i, text in sorted(ends.items())
    ],
    'pre_tokenizer': level | {'trim_offsets': True},
    'decoder': level | {'trim_offsets': True},
    'model': {'type': 'BPE', 'vocab': vocab, 'merges': []},
  }
  (folder / 'tokenizer.json').write_text(json.dumps(values))
  names = dict(bos_token='<s>', eos_token='</s>')
  (folder / 'tokenizer_config.json').write_text(json.dumps(names))


def renamed(folder, family, text):
  """Makes a golden folder one of another family, with its prefix."""
  path, own = folder / 'config.json', dialects.dialect(family)
  values = json.loads(path.read_text())
  outer = {'architectures': [own.architectures[0]], 'model_type': family}
  inner = {'text_config': values | {'model_type': text}}
  path.write_text(json.dumps(outer | inner if text else values | outer))
  arrays = {own.prefix + name: x for name, x in tensors(folder).items()}
  plan = {name: (x.dtype, x.shape) for name, x in arrays.items()}
  with safetensors.create(folder / 'model.safetensors', plan) as out:
    for name, x in arrays.items():
      out[name][...] = x


def released(folder, family):
  """Makes the folder of a family, as people download it."""
  golden, text = OTHERS.get(family) or ((FAMILIES | ALIKE)[family], '')
  shutil.copytree(GOLDEN / golden, folder)
  (folder / 'expected.npz').unlink()
  if family in OTHERS:
    renamed(folder, family, text)
  write_tokenizer(folder, load_huggingface(folder)[0])
  return folder


def forward(folder):
  """Returns the function from ids to the logits after each of them."""
  config, variables = load_huggingface(folder)
  run = jax.jit(Transformer(config).apply)

  def logits(ids):
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(run(variables, padded).logits)[0, : len(ids)]

  return logits


def greedy(logits, words):
  """Returns the text of at most COUNT likeliest tokens after the prompt."""
  ids = [words.bos_id, *words.encode(PROMPT).tolist()]
  start = len(ids)
  while len(ids) < start + COUNT:
    ids.append(int(logits(ids)[-1].argmax()))
    if ids[-1] == words.eos_id:
      break
  return words.decode(ids[start:])


def loss_of(logits, path, words):
  """Returns the mean loss of the completions that are learned."""
  train, _ = examples.split(examples.read(str(path), words), 0.02)
  terms = []
  for example in train:
    ids = [*example.prompt, *example.completion]
    log_probs = np.asarray(jax.nn.log_softmax(logits(ids[:-1])))
    first = len(example.prompt)
    terms += [-log_probs[i - 1, ids[i]] for i in range(first, len(ids))]
  assert len(train) == 2 and len(terms) > 5
  return np.mean(terms)


def served(folder):
  """Returns the text with which a server of the folder completes the prompt."""
  model = opened.open_model(folder)
  sizes = dict(rows=1, length=LENGTH, pages=8, cache=CacheConfig(page=8))
  engine = Engine(scheduler.Scheduler(model.config, model.variables, **sizes))
  body = {'prompt': PROMPT, 'max_tokens': COUNT, 'temperature': 0}
  try:
    app = endpoint.app(engine, model, 'tiny', 5000)
    ask = asgi.call(app, '/v1/completions', json.dumps(body).encode())
    status, answer = asyncio.run(asyncio.wait_for(ask, 120))
  finally:
    engine.close()
  assert status == 200, answer
  return answer['choices'][0]['text']


def losses(run):
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if 'main_loss' in row]
  return {row['step']: row['main_loss'] for row in rows}


def check_same(ours, theirs):
  """The same files beside the weights, tensors and config, byte for byte."""
  a, b = tensors(ours), tensors(theirs)
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
    assert a[name].tobytes() == b[name].tobytes(), name
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()
  assert load_huggingface(ours)[0] == load_huggingface(theirs)[0]


@pytest.fixture
def run(call):
  """Runs a program's words, which must succeed; returns its output."""

  def succeed(program, *words):
    code, out, error = call(program, *words)
    assert code == 0, f'{program}: {out}{error}'
    return out

  return succeed


def converted(run, release, family):
  """Returns the run that `convert` makes of a release, and its config's flag.

  The release goes out of it again byte for byte.
  """
  root = release.parent
  recipe = (f'--config.{change}' for change in SHORT)
  where = f'--source={release}', f'--target={root}/run'
  run('convert', *where, '--config=configs/sft.py:tiny', *recipe)
  run('convert', f'--source={root}/run', f'--target={root}/back')
  check_same(root / 'back', release)
  assert family in run('inspect', str(release))
  config = f'--config={root}/run/config.py'
  assert 'GiB' in run('plan', config, '--topology=h100:1')
  return root / 'run', config


def generated(run, folder, words, logits):
  """Returns the text of `generate`, which is that of greedy decoding."""
  text = greedy(logits, words)
  flags = f'--prompt={PROMPT}', f'--max_new_tokens={COUNT}'
  assert run('generate', f'--checkpoint={folder}', *flags) == f'{text}\n'
  return text


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_a_release_is_read_speaks_learns_and_goes_out(family, tmp_path, run):
  release = released(tmp_path / 'release', family)
  folder, config = converted(run, release, family)
  words, logits = tokenizer.load(str(release)), forward(release)
  text = generated(run, folder, words, logits)
  assert served(release) == text != ''

  path, tuned = tmp_path / 'rows.jsonl', tmp_path / 'tuned'
  rows = [dict(prompt=p, completion=c) for p, c in ROWS]
  path.write_text('\n'.join(map(json.dumps, rows)))
  run(
    'sft', config, f'--data={path}', f'--init={release}', f'--workdir={tuned}'
  )
  learned = losses(tuned)
  right = loss_of(logits, path, words)
  np.testing.assert_allclose(learned[1], right, rtol=1e-4)
  assert learned[2] < learned[1] and len(learned) == 2

  run('convert', f'--source={tuned}', f'--target={tmp_path}/out')
  model, variables = load_huggingface(tmp_path / 'out')
  expected, state = load_run(tuned)
  assert model.release == expected.model.release
  chex.assert_trees_all_equal(variables, state)


@pytest.mark.slow
@pytest.mark.parametrize('family', ALIKE)
def test_a_release_is_read_speaks_and_goes_out(family, tmp_path, run):
  release = released(tmp_path / 'release', family)
  folder, _ = converted(run, release, family)
  words = tokenizer.load(str(release))
  assert generated(run, folder, words, forward(release)) != ''


@pytest.mark.slow
@pytest.mark.parametrize('family', OTHERS)
def test_a_family_s_words_stand_for_the_same_network(family, tmp_path, run):
  """So it speaks and learns as that of the golden folder does."""
  release = released(tmp_path / 'release', family)
  folder, _ = converted(run, release, family)
  config, variables = load_run(folder)
  golden, expected = load_huggingface(GOLDEN / OTHERS[family][0])
  same = dict(compute=config.model.compute, release=config.model.release)
  assert config.model == dataclasses.replace(golden, **same)
  assert config.model.release.family == family
  chex.assert_trees_all_equal(variables, expected)
