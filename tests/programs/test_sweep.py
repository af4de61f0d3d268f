"""Sweeps, the doctor, the profile's table: small programs beside training."""

import json
import sys
import types

import children
import jax
import jax.numpy as jnp
import pytest

from experiments import doctor, profile, sweep
from experiments.training import tracking
from mla_moe.config import ConfigError


def test_combinations_and_their_folders():
  runs = sweep.combinations(
    ['config.optim.learning_rate=1e-3,3e-3', 'run.seed=0,1']
  )
  assert len(runs) == 4 and runs[1] == {
    'optim.learning_rate': '1e-3',
    'run.seed': '1',
  }
  assert sweep.name_of(runs[1]) == 'learning_rate=1e-3,seed=1'
  assert sweep.overrides(runs[1])[1] == '--config.run.seed=1'


@pytest.mark.parametrize('bad', ['x', 'x=', '=1', ''])
def test_what_is_no_list_of_values(bad):
  with pytest.raises(ConfigError, match='key=value'):
    sweep.combinations([bad])
  with pytest.raises(ConfigError, match='is there already'):
    sweep.combinations(['a=1', 'config.a=2'])


def test_the_table_puts_the_best_run_first(tmp_path, capsys):
  runs = sweep.combinations(['run.seed=0,1,2'])
  for values, bits in zip(runs[:2], (2.5, 2.1), strict=True):
    folder = tmp_path / sweep.name_of(values)
    folder.mkdir()
    lines = [
      {'step': 1, 'main_loss': 3.0, 'loss': 3.1, 'tokens_per_s': 12345.6}
    ]
    lines += [{'step': 2, 'bits_per_byte': bits, 'gzip_bits_per_byte': 3.0}]
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (folder / 'metrics.jsonl').write_text(text)
  sweep.show(sweep.results(tmp_path, runs))
  output = capsys.readouterr().out
  assert '12,346' in output
  assert output.index('2.1') < output.index('2.5') < output.index('-  ')


def sweep_of(*words):
  return children.run('-m', 'experiments.sweep', *words, timeout=250)


@pytest.mark.filterwarnings('ignore:the load_module')
def test_dry_runs_here_and_there(monkeypatch, capsys):
  def output(*words):
    vary = ['--vary=run.seed=0,1', '--dry-run']
    monkeypatch.setattr(sys, 'argv', ['sweep', *vary, *words])
    sweep.main()
    return capsys.readouterr().out

  assert output('--', '--config=c.py').count('experiments.train') == 2
  flags = ('slurm', '--name=s', '--topology=h100:8', '--storage=/runs')
  train = ('--', '--config=configs/tiny.py:micro', '--config.mesh.fsdp=8')
  remote = output(*flags, *train)
  assert remote.count('sbatch --job-name=s-') == 2
  for i in (0, 1):
    assert f'--config.run.seed={i} --workdir=/runs/s-{i}' in remote
  with pytest.raises(SystemExit) as ended:  # both, and nothing is started
    output(*flags, *train[:-1])
  message = capsys.readouterr()
  assert ended.value.code == 2 and not message.out
  assert message.err.count('its product is 1, h100:8 has 8 devices') == 1


@pytest.mark.slow
def test_a_sweep_trains_and_shows_its_results(tmp_path):
  process = sweep_of(
    '--vary=optim.learning_rate=1e-3,3e-3',
    f'--workdir={tmp_path}',
    '--',
    '--config=configs/tiny.py:micro',
    '--config.run.steps=3',
    '--config.run.eval_every=3',
    '--config.run.eval_batches=1',
  )
  assert process.returncode == 0, process.stderr
  table = process.stdout[process.stdout.index('bits_per_byte') :]
  assert '1e-3' in table and '3e-3' in table and ' 3 ' in table


def test_known_trouble_is_named():
  good = {'jax': '0.10.2', 'jaxlib': '0.10.2', 'flax': '0.12.8'}
  assert doctor.trouble(good, (3, 11, 7)) == []
  bad = [
    ({**good, 'jax': '0.9.0'}, 'too old'),
    ({**good, 'flax': '0.12.9'}, 'broken'),
    ({**good, 'jax': '0.12.0.1', 'jaxlib': '0.12.0'}, 'nnx'),
    ({**good, 'jaxlib': '0.9.1'}, 'do not match'),
  ]
  for versions, message in bad:
    assert any(message in line for line in doctor.trouble(versions, (3, 12, 1)))
  assert 'Python' in doctor.trouble(good, (3, 10, 0))[0]


def test_the_doctor_reports():
  process = children.run('-m', 'experiments.doctor', timeout=100)
  for word in ('commit', 'python', 'disk', 'jax ', 'device', 'cpu'):
    assert word in process.stdout


def test_steps_of_a_profile():
  assert profile.window('5:8') == (5, 8) and profile.window('')[1] < 0
  for bad in ('5', '8:5', '1:2', 'a:b', '5:'):
    with pytest.raises(ConfigError, match='must be FIRST:LAST'):
      profile.window(bad)


def test_a_trace_names_the_operations(tmp_path, capsys):
  product = jax.jit(lambda x: jnp.sin(x @ x).sum())
  x = jnp.ones((300, 300))
  y = product(x)
  rests, took = [], []
  with profile.steps(
    tmp_path, 2, 3, lambda: rests.append(len(took))
  ) as before_step:
    for step in range(1, 6):
      took.append(before_step(step, y))
      y = product(x)
  assert [seconds > 0 for seconds in took] == [False, True, False, True, False]
  assert rests == [1, 3]  # no watchdog counts what a trace takes
  output = capsys.readouterr().out
  assert 'operation' in output and 'steps 2 to 3' in output
  rows = profile.operations(tmp_path)
  assert rows, output
  assert all(count >= 2 for count, _ in rows.values())  # two steps
  assert not any(name.startswith('end') for name in rows)


def _operations(folder, monkeypatch, **planes):
  """The table of a made trace: {plane: {line: names of events}}."""
  space = types.SimpleNamespace
  event = lambda name: space(name=name, duration_ns=1e6)
  line = lambda name, events: space(name=name, events=[*map(event, events)])
  trace = [
    space(
      name=f'/{name.replace("_", ":")}',
      lines=[line(*item) for item in lines.items()],
    )
    for name, lines in planes.items()
  ]
  from_file = lambda _: space(planes=trace)
  monkeypatch.setattr(jax.profiler, 'ProfileData', space(from_file=from_file))
  (folder / 'host.xplane.pb').touch()
  return profile.operations(folder)


def test_operations_of_a_cpu_are_those_that_end(tmp_path, monkeypatch):
  """On whichever thread; a compiler that is loaded adds an empty device."""
  threads = {
    '0': ['sine.1', 'wait', 'dot'],
    '1': ['end: sine.1', 'end: dot', 'sine.2', 'end: sine.2'],
  }
  rows = {'sine': (2, 2e-3), 'dot': (1, 1e-3)}
  table = lambda **planes: _operations(tmp_path, monkeypatch, **planes)
  assert table(host_CPU=threads) == rows
  assert table(device_CUSTOM={}, host_CPU=threads) == rows
  assert table(device_CUSTOM={'Steps': ['1']}, host_CPU=threads) == rows
  device = {'XLA Ops': ['fusion.7'], 'Steps': ['1']}
  assert table(host_CPU=threads, device_TPU=device) == {'fusion': (1, 1e-3)}


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_trackers_get_the_numbers_of_a_row(name, tmp_path, monkeypatch):
  calls = []
  fake = types.SimpleNamespace(
    init=lambda **k: calls.append(('init', k)),
    log=lambda row, step: calls.append(('log', row, step)),
    finish=lambda: calls.append(('finish',)),
  )
  monkeypatch.setitem(sys.modules, name, fake)
  tracker = tracking.Tracker(name, tmp_path, {'seed': 1})
  tracker.write({'step': 3, 'loss': 2.5, 'max_vio_layers': [1.0]})
  tracker.close()
  assert calls[0][1]['config'] == {'seed': 1}
  assert ('resume' in calls[0][1]) == (name == 'wandb')
  if name == 'wandb':
    assert calls[0][1]['id'] == tracking.identity(tmp_path)
  assert calls[1:] == [('log', {'loss': 2.5}, 3), ('finish',)]


def test_a_trackers_id_belongs_to_the_folder_and_not_to_its_path(tmp_path):
  paths = [tmp_path / 'content' / 'runs', tmp_path / 'content-runs']
  for path in paths:
    path.mkdir(parents=True)
  first, second = map(tracking.identity, paths)
  assert first != second and [first, second] == [*map(tracking.identity, paths)]
  moved = paths[0].rename(tmp_path / 'moved')
  assert tracking.identity(moved) == first
  paths[0].mkdir()  # begun anew
  assert tracking.identity(paths[0]) not in (first, second)
  (moved / 'tracker_id').write_text('a/b', encoding='utf-8')  # no id
  assert tracking.identity(moved).isalnum()


def test_a_tracker_that_is_not_there_names_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ConfigError, match=r'pip install "mla_moe\[wandb\]"'):
    tracking.library('wandb')
  with pytest.raises(ConfigError, match='must be wandb or trackio'):
    tracking.library('mlflow')


def device_files(root, *names):
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    vendor = '0x1ae0\n' if 'google' in name else '0x8086\n'
    path.write_text(vendor, encoding='utf-8')
  return doctor.accelerators(root)


def test_an_accelerator_that_jax_does_not_see_is_named(tmp_path):
  root = lambda name: tmp_path / name
  assert device_files(root('none'), 'dev/nvidiactl', 'dev/accel/accel0') == {}
  gpu = device_files(root('gpu'), 'proc/driver/nvidia/version', 'dev/nvidia0')
  assert gpu == {'gpu': '/dev/nvidia0'}
  bus = 'sys/bus/pci/devices'
  assert not device_files(root('vm'), 'dev/vfio/0', f'{bus}/intel/vendor')
  tpu = device_files(root('tpu'), 'dev/vfio/0', f'{bus}/google/vendor')
  assert tpu == {'tpu': '/dev/vfio/0'}
  assert device_files(root('v4'), 'dev/accel0') == {'tpu': '/dev/accel0'}
  says = lambda *args: doctor.unseen(*args)[0].partition(': ')[2]
  assert doctor.unseen(gpu | tpu, ['gpu; H100', 'tpu; v5e'], {}, '') == []
  assert doctor.unseen(gpu, ['gpu; H100'], {}, 'cuda') == []
  assert says(gpu, ['cpu'], {}, '') == 'pip install "mla_moe[cuda]"'
  assert says(tpu, ['cpu'], {}, '') == 'pip install "mla_moe[tpu]"'
  assert says(gpu, ['cpu'], {}, 'cpu') == 'JAX_PLATFORMS=cpu hides it'
  assert 'driver' in says(gpu, ['cpu'], {'jax-cuda13-plugin': '1'}, '')
  assert 'driver' in says(gpu, [], {'jax-cuda13-plugin': '1'}, 'cuda,cpu')
  assert 'another process' in says(tpu, ['cpu'], {'libtpu': '1'}, '')
