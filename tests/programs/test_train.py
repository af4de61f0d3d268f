"""The program: exact resume, signals, the workdir, errors, the report."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import sys
import time

import children
import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from oracles import block_product

from configs import tiny
from experiments import cli, report, train, workdir
from experiments.checkpointing import folders, load, store
from experiments.data import tokenizer
from experiments.training import metrics, steps
from mla_moe import fp8
from mla_moe.config import (
  ComputeConfig,
  ConfigError,
  MeshConfig,
  MTPConfig,
  freeze,
)
from mla_moe.decode import generation
from mla_moe.kernels import block_tpu
from mla_moe.train.state import init_state

ROOT = pathlib.Path(__file__).parents[2]
# The smoke run's steps and chores, of a model that compiles quickly.
SMOKE = dataclasses.replace(
  freeze(tiny.get_config('micro')), run=freeze(tiny.get_config('smoke')).run
)

# Third-party code that the loop calls: none of it is ours to mend.
pytestmark = pytest.mark.filterwarnings('default')


def shorter(steps):
  return dataclasses.replace(
    SMOKE, run=dataclasses.replace(SMOKE.run, steps=steps)
  )


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """One run of 20 steps, and one of 10 that is then continued to 20."""
  root = tmp_path_factory.mktemp('runs')
  whole = train.run(SMOKE, root / 'whole')
  train.run(shorter(10), root / 'halves')
  with open(root / 'halves' / 'metrics.jsonl', 'a', encoding='utf-8') as file:
    file.write('{"step": 11, "loss": 1.0}\n{"step": 12, "lo')  # torn
  resumed = train.run(SMOKE, root / 'halves')
  assert train.run(SMOKE, root / 'halves') == resumed  # finished: nothing to do
  return root, whole, resumed


def state_of(folder):
  like = init_state(jax.random.key(1), SMOKE)
  return store.restore(folder / 'checkpoints', like)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_bit_for_bit(runs):
  root, whole, resumed = runs
  assert whole == resumed
  states = [state_of(root / name) for name in ('whole', 'halves')]
  assert [s[0] for s in states] == [20, 20]
  for a, b in zip(*(jax.tree.leaves(s[1]) for s in states), strict=True):
    np.testing.assert_array_equal(a, b)
  timing = ('tokens_per_s', 'mfu', 'memory_mib')
  rows = [
    [
      {k: v for k, v in row.items() if k not in timing}
      for row in workdir.rows(root / name / 'metrics.jsonl')
    ]
    for name in ('whole', 'halves')
  ]
  assert rows[0] == rows[1]
  assert [r['step'] for r in rows[0] if 'loss' in r] == list(range(1, 21))


@pytest.mark.slow
def test_writing_a_trace_is_no_time_of_a_step(tmp_path, monkeypatch):
  def slow(step, state):
    time.sleep(3.0 if step == 5 else 0.0)
    return 3.0 if step == 5 else 0.0

  trace = lambda *_: contextlib.nullcontext(slow)
  monkeypatch.setattr(train.profile, 'steps', trace)
  train.run(shorter(8), tmp_path / 'run')
  rows = workdir.rows(tmp_path / 'run' / 'metrics.jsonl')
  tokens = SMOKE.data.batch_size * SMOKE.data.seq_len
  rates = [r['tokens_per_s'] for r in rows if 'tokens_per_s' in r]
  assert len(rates) >= 2 and min(rates) > tokens / 3.0


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(runs):
  root, whole, _ = runs
  folder = root / 'whole'
  names = {path.name for path in folder.iterdir()}
  assert {'config.json', 'checkpoints', 'samples.txt', 'report.html'} <= names
  assert {'metrics.jsonl', 'load.jsonl', 'tensorboard'} <= names
  row = workdir.rows(folder / 'metrics.jsonl')[5]
  wanted = 'step tokens loss lr grad_norm tokens_per_s mfu max_vio entropy'
  assert set(wanted.split()) <= set(row)
  assert whole['bits_per_byte'] < 8
  assert workdir.read_config(folder) == SMOKE
  page = (folder / 'report.html').read_text()
  assert page.count('<svg') == 3
  assert '<script' not in page and 'src=' not in page
  assert report.write(folder) == folder / 'report.html'


@pytest.mark.slow
def test_another_config_is_refused_with_the_field(runs):
  root, _, _ = runs
  data = dataclasses.replace(SMOKE.data, seq_len=64)
  other = dataclasses.replace(SMOKE, data=data)
  with pytest.raises(ConfigError, match='data.seq_len: 64 != 16'):
    train.run(other, root / 'whole')


@pytest.mark.slow
def test_another_dtype_in_a_checkpoint_is_refused(runs):
  root, _, _ = runs
  like = init_state(jax.random.key(1), SMOKE)
  half = jax.tree.map(lambda x: x.astype('bfloat16'), like.params)
  with pytest.raises(ConfigError, match='bfloat16'):
    store.restore(root / 'whole/checkpoints', like.replace(params=half))


def test_row32_the_workdir_is_one_writers(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='is a file'):
    train.run(SMOKE, tmp_path / 'file')
  with workdir.claim(tmp_path / 'run', SMOKE):
    with pytest.raises(ConfigError, match=f'process {os.getpid()}'):
      with workdir.claim(tmp_path / 'run', SMOKE):
        pass
  with workdir.claim(tmp_path / 'run', SMOKE):
    pass


def program(*args):
  words = '-m', 'experiments.train', *args
  return children.Child(*words, env=children.on_devices(1))


@pytest.mark.parametrize(
  'args, words',
  [
    (['--config.model.layres=3'], 'layers'),
    (
      ['--config.model.moe.topk=3'],
      'error: config.model.moe.topk: there is no such key; did you mean '
      'config.model.moe.top_k?\n',
    ),
    (['--config.model.layers=three'], 'config.model.layers=three: must be an'),
    (['--config.model.moe.top_k=99'], 'config.model.moe.top_k=99'),
    (['--config', 'configs/tinny.py:smoke'], 'did you mean tiny?'),
    (['--config=tiny:huge'], "error: variant 'huge': there is only micro, s"),
    (['--confg=x'], 'confg'),
    (['--config.mesh.data=2'], 'devices'),
    (['--config.data.source=/nowhere'], 'no such file'),
    (
      ['--config.model.precision=fp8_block', '--config.model.compute.fp8=mgpu'],
      "compute.fp8='mgpu': precision=fp8_block on cpu (cpu) can be dequant",
    ),
  ],
)
def test_row31_bad_input_is_one_line_and_exit_code_2(
  tmp_path, call, args, words
):
  code, _, err = call('train', f'--workdir={tmp_path}/run', *args)
  assert code == 2, err
  assert words in err and len(err.strip().splitlines()) == 1, err


def test_row31_bad_input_ends_a_process_without_a_traceback(tmp_path):
  ran = program(f'--workdir={tmp_path}/run', '--config.mesh.data=2')
  _, err = ran.communicate(timeout=60)
  assert ran.returncode == 2 and 'devices' in err
  assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
  'text, said',
  [
    ('from configs import tinny\n', 'line 1: ImportError'),
    ("def get_config(arg='')\n  return 3\n", 'line 1: SyntaxError: expected'),
    ('x = 1\n', 'mine.py: has no function get_config'),
    ("def get_config(arg=''):\n  return 3\n", 'gives 3; it must return'),
    ("def get_config(arg=''):\n  return {}['x']\n", "line 2: KeyError: 'x'"),
    ("def get_config(arg=''):\n  return 1 + 'x'\n", 'line 2: TypeError: uns'),
    (
      "def get_config(arg=''):\n  raise ValueError(3)\n",
      'line 2: ValueError: 3',
    ),
  ],
)
def test_what_is_wrong_with_a_config_file_is_said_with_its_line(
  tmp_path, monkeypatch, text, said
):
  (tmp_path / 'mine.py').write_text(text)
  monkeypatch.setattr(cli, 'FLAGS', flags.FlagValues())
  monkeypatch.setattr(sys, 'argv', ['train', f'--config={tmp_path}/mine.py'])

  def define():
    config_flags.DEFINE_config_file('config', '', '', flag_values=cli.FLAGS)

  with pytest.raises(ConfigError) as error:
    cli._parse(define)
  assert said in str(error.value) and '\n' not in str(error.value)
  assert 'Traceback' not in str(error.value)


def test_ours_is_all_that_is_said_of_an_error_in_a_config_file(tmp_path):
  name = tmp_path / 'mine.py'
  name.write_text(
    'from configs import tiny\n\n\ndef get_config(arg):\n'
    '  return tiny.get_config(arg)\n'
  )
  for flag in (f'--config={name}:huge', '--config=tiny:huge'):
    with pytest.raises(ConfigError) as error:
      cli.config_of([flag], cli.define)
    assert str(error.value) == "variant 'huge': there is only micro, smoke"


def test_help_is_of_the_config_and_of_our_flags(monkeypatch, capsys):
  own = flags.FlagValues()
  monkeypatch.setattr(cli, 'FLAGS', own)
  words = ['--config=configs/deepseek_v2_lite.py', '--config.run.steps=7']
  monkeypatch.setattr(sys, 'argv', ['train', *words, '--help'])
  flags.DEFINE_string('log_dir', '', "A library's.", flag_values=own)

  def define():
    config_flags.DEFINE_config_file('config', '', '', flag_values=own)
    flags.DEFINE_string('workdir', 'here', 'Of the run.', flag_values=own)

  with pytest.raises(SystemExit) as ended:
    cli._parse(define)
  shown = capsys.readouterr().out
  assert ended.value.code == 0 and 'log_dir' not in shown
  words = shown.split()
  assert words.index('--workdir=here') < words.index('--config.run.steps=7')
  assert '--config.model.moe.top_k=6' in words
  assert all(f'--{key}=' in shown for key in cli.config_keys())
  assert 'Multi-head Latent Attention' in shown  # the group's meaning


@pytest.mark.parametrize(
  'key, hint',
  [
    ('config.optim.lr', 'did you mean config.optim.learning_rate?'),
    ('config.top_k', 'did you mean config.model.moe.top_k?'),
    ('config.model.dimm', 'did you mean config.model.dim?'),
    ('config.colour', '--help lists them'),
  ],
)
def test_a_key_is_looked_for_in_every_group(key, hint):
  text = cli._no_key(['--config.run.steps=3', f'--{key}=3'])
  assert text == f'{key}: there is no such key; {hint}'
  assert not cli._no_key(['--config.model.moe.top_k=3', '--workdir=config.x'])


@pytest.mark.parametrize(
  'raised, code, said',
  [
    (KeyboardInterrupt(), 1, 'Interrupted.'),
    (cli.Stopped('why'), 1, 'error: why'),
    (ConfigError('x=1: must be 2'), 2, 'error: x=1: must be 2'),
  ],
)
def test_the_edge_says_one_line(capsys, raised, code, said):
  with pytest.raises(SystemExit) as ended, cli.edge():
    raise raised
  assert ended.value.code == code
  assert capsys.readouterr().err == f'{said}\n'


def test_a_reader_that_goes_away_is_no_traceback():
  with program('--help') as ran:
    ran.stdout.close()
    said = ran.stderr.read()
  assert ran.returncode == 1
  assert said == 'Ended: nobody reads the output any more.\n'


def test_a_run_that_never_began_binds_its_folder_to_nothing(tmp_path):
  other = dataclasses.replace(
    SMOKE, optim=dataclasses.replace(SMOKE.optim, learning_rate=1.0)
  )
  for config in (SMOKE, other):
    with workdir.claim(tmp_path, config):
      pass
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  with pytest.raises(ConfigError, match='1.0'):
    with workdir.claim(tmp_path, SMOKE):
      pass
  foreign = tmp_path / 'release'
  foreign.mkdir()
  (foreign / 'config.json').write_text('{"model_type": "deepseek_v3"}')
  with pytest.raises(ConfigError):
    with workdir.claim(foreign, SMOKE):
      pass
  assert 'deepseek_v3' in (foreign / 'config.json').read_text()
  with pytest.raises(ConfigError, match='such as runs/mine'):
    with workdir.claim('', SMOKE):
      pass


def test_fp8_without_its_hardware_says_so_in_one_line(tmp_path, call):
  where = f'--workdir={tmp_path}/run', '--config.data.source=/nowhere'
  _, out, _ = call('train', *where, '--config.model.precision=fp8_block')
  line = 'precision=fp8_block has no FP8 hardware on cpu (cpu): dequant'
  assert out.splitlines() == [line]


@pytest.mark.slow
def test_products_without_their_kernel_are_counted(
  tmp_path, monkeypatch, capsys
):
  """Kernels are one device's: GSPMD's products fall back call by call."""
  monkeypatch.setattr(fp8, 'choose', lambda *_: ('tpu', ''))

  def plain(*args, dtype):  # for those in shard_map, which a CPU cannot run
    return block_product(*args).astype(dtype)

  monkeypatch.setattr(block_tpu, 'matmul', plain)
  config = dataclasses.replace(
    shorter(1),
    model=dataclasses.replace(
      SMOKE.model,
      precision='fp8_block',
      compute=ComputeConfig(fp8='tpu'),
      dense_layers=SMOKE.model.layers,
      mtp=MTPConfig(0),
    ),
    mesh=MeshConfig(fsdp=8),
  )
  train.run(config, tmp_path / 'run')
  row = workdir.rows(tmp_path / 'run' / 'metrics.jsonl')[0]
  assert row['fp8_fallbacks'] > 0
  why = 'fp8 impl=tpu has no kernel for a mesh of 8 devices outside'
  assert capsys.readouterr().out.count(why) == 1


@pytest.mark.slow
def test_a_run_tells_the_health_of_fp8(tmp_path):
  config = dataclasses.replace(
    SMOKE,
    model=dataclasses.replace(SMOKE.model, precision='fp8_block'),
    run=dataclasses.replace(
      SMOKE.run, steps=2, health_every=2, eval_every=0, sample_every=0
    ),
  )
  train.run(config, tmp_path / 'run')
  rows = workdir.rows(tmp_path / 'run' / 'metrics.jsonl')
  (row,) = (row for row in rows if 'fp8_error' in row)
  assert row['step'] == 2 and 0.02 < row['fp8_error'] < 0.06
  assert '<h2>FP8</h2>' in (tmp_path / 'run' / 'report.html').read_text()


@pytest.mark.slow
def test_a_mesh_samples_the_text_that_one_device_samples(tmp_path):
  """Also where stages hold the layers, and devices hold parts of a row."""
  model = dataclasses.replace(SMOKE.model, layers=3)
  chores = dict(steps=1, eval_every=0, sample_every=1, save_every=1)
  config = dataclasses.replace(
    SMOKE,
    model=model,
    mesh=MeshConfig(stage=2, context=2, fsdp=2),
    run=dataclasses.replace(SMOKE.run, **chores),
  )
  train.run(config, tmp_path / 'run')
  assert not workdir.rows(tmp_path / 'run' / 'incidents.jsonl')
  sample = (tmp_path / 'run' / 'samples.txt').read_text()
  _, variables = load.load_run(tmp_path / 'run')
  prompt, _, text = sample.removeprefix('--- step 1\n').partition('<<<\n')
  words = tokenizer.ByteTokenizer()
  tokens = np.array([words.encode(prompt)], np.int32)
  rollout = generation.rollout(
    model, variables, tokens, SMOKE.data.seq_len // 2, temperature=0.7, seed=1
  )
  assert text == words.decode(rollout.tokens[0]) + '\n'


@pytest.mark.slow
def test_sigterm_saves_and_exits_0(tmp_path):
  folder = tmp_path / 'run'
  ran = program(
    '--config=configs/tiny.py:micro',
    f'--workdir={folder}',
    '--config.run.steps=1000000',
  )
  deadline = time.time() + 120
  while time.time() < deadline and ran.poll() is None:
    if len(workdir.rows(folder / 'metrics.jsonl')) > 3:
      break
    time.sleep(0.2)
  ran.send_signal(signal.SIGTERM)
  out, err = ran.communicate(timeout=60)
  assert ran.returncode == 0, err
  assert 'Stopped by SIGTERM at step' in out
  last = json.loads((folder / 'metrics.jsonl').read_text().splitlines()[-1])
  assert folders.steps(folder / 'checkpoints')[-1] == last['step']


def test_schedules_get_the_tokens_before_a_step():
  tokens = SMOKE.data.batch_size * SMOKE.data.seq_len
  phases = ('constant', 2 * tokens, 1.0), ('linear', 2 * tokens, 0.0)
  optim = dataclasses.replace(SMOKE.optim, warmup_steps=0, phases=phases)
  config = dataclasses.replace(shorter(4), optim=optim)
  rates = [steps.rates(config, number) for number in range(1, 6)]
  right = optim.learning_rate * np.array([1, 1, 1, 0.5, 0])
  np.testing.assert_allclose([r.learning_rate for r in rates], right)


@pytest.mark.parametrize(
  'count, words',
  [(4, ''), (3, '4, the run at 3: .* 100% '), (8, '4, the run at 8: .* 0% ')],
)
def test_a_schedule_that_does_not_end_with_the_run_is_said(count, words):
  tokens = SMOKE.data.batch_size * SMOKE.data.seq_len
  phases = ('constant', 2 * tokens, 1.0), ('linear', 2 * tokens, 0.0)
  optim = dataclasses.replace(SMOKE.optim, warmup_steps=0, phases=phases)
  config = dataclasses.replace(shorter(count), optim=optim)
  line = steps.schedule_end(config)
  assert re.search(words, line) and bool(line) == bool(words)


@pytest.mark.parametrize(
  'save_every, check_every, right',
  [
    (1, 9, {1, 2, 3, 4, 5, 6}),
    (3, 9, {1, 4, 6}),
    (0, 2, {2, 4, 6}),
    (1, 0, set()),
  ],
)
def test_fingerprints_are_due_behind_each_save(save_every, check_every, right):
  run = dict(steps=6, save_every=save_every, check_every=check_every)
  run = dataclasses.replace(SMOKE.run, **run)
  assert {n for n in range(1, 7) if steps.is_checked(run, n)} == set(right)


def test_max_violation_by_hand():
  load = np.array([[2, 2, 2, 2], [8, 0, 0, 0], [3, 1, 2, 2], [0, 0, 0, 0]])
  np.testing.assert_allclose(metrics.max_violation(load), [0, 3, 0.5, 0])
  health = metrics.health(load[:3], load[:3])
  assert health['dead_experts'] == 3
  assert health['max_vio'] == pytest.approx(3.5 / 3)
