"""Reports: bad rows, comparisons of runs, legends off the curves.

The runs are files as a training run writes them, made here in milliseconds.
"""

import json
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from experiments import comparison, history, page, report
from mla_moe.config import ConfigError

pytest.importorskip('matplotlib')
VIO = {'max_vio': 0.5, 'max_vio_running': 0.3}
VIO |= {'max_vio_layers': [0.4, 0.6], 'max_vio_running_layers': [0.2, 0.4]}


def step(number, **more):
  """A row of metrics.jsonl."""
  loss = 5.5 / number**0.3
  return {
    'step': number,
    'tokens': 64 * number,
    'loss': loss,
    'main_loss': loss,
    'mtp_loss': loss + 0.2,
    'lr': 1e-3,
    'grad_norm': 1 / number,
    'memory_mib': 100.0,
    'tokens_per_s': 1000.0,
    'mfu': 0.1,
    'entropy': [2.0, 2.1],
    **VIO,
    **more,
  }


def evaluation(number, bits):
  return {'step': number, 'bits_per_byte': bits, 'gzip_bits_per_byte': 2.6}


def write(folder, rows, **config):
  """A run's folder of these rows; a text among them is a line."""
  folder.mkdir(parents=True, exist_ok=True)
  text = lambda row: row if isinstance(row, str) else json.dumps(row)
  lines = ''.join(f'{text(row)}\n' for row in rows)
  (folder / 'metrics.jsonl').write_text(lines, encoding='utf-8')
  values = {'model': {'layers': 3, 'dense_layers': 1}, 'mesh': {'fsdp': 1}}
  content = json.dumps(values | config)
  (folder / 'config.json').write_text(content, encoding='utf-8')
  loads = [{'step': n, 'load': [[1, 3], [2, 2]]} for n in (1, 2)]
  content = ''.join(f'{json.dumps(row)}\n' for row in loads)
  (folder / 'load.jsonl').write_text(content, encoding='utf-8')
  start = {'step': 0, 'date': '2026-11-29 12:00:00', 'commit': 'abc1234'}
  start |= {'python': '3.12.1', 'jax': '0.10.2', 'flax': '0.12.8'}
  start |= {'device': 'TPU v5e', 'devices': 16, 'processes': 4}
  content = f'{json.dumps(start)}\n'
  (folder / 'starts.jsonl').write_text(content, encoding='utf-8')
  return folder


GOOD = [step(n) for n in range(1, 21)] + [evaluation(10, 3.0)]
BAD = [
  *('3', '[]', '{"step": 1', 'null', '"text"', '{}', '[' * 10**5),
  *(step(1, step=bad) for bad in ('5', None, math.nan, -1, 1.5, True)),
  step(1, step=10**400),
  step(5, main_loss='2'),
  step(5, lr=[1.0]),
  step(5, tokens=None),
  step(5, tokens_per_s='fast'),
  step(5, max_vio_layers=[1.0]),
  step(5, max_vio_layers='ab'),
  step(5, entropy=[[1.0, 2.0], [3.0, 4.0]]),
  step(5, entropy={}),
  {'step': 5, 'loss': 1.0},
  {'step': 5, 'bits_per_byte': 'low', 'gzip_bits_per_byte': 2.6},
  {'step': 5, 'bits_per_byte': 2.0, 'gzip_bits_per_byte': 'x'},
  {'step': 5, 'fp8_layers': [1]},
  {'step': 5, 'fp8_layers': {'x_error': [[1.0]]}},
]


def test_bad_rows_are_left_out_and_counted_in_a_line(tmp_path, capsys):
  mixed = [*GOOD[:5], *BAD, *GOOD[5:]]
  run = history.read(write(tmp_path / 'run', mixed))
  assert [r['step'] for r in run.steps] == [*range(1, 21)]
  assert run.evaluations == GOOD[-1:] and not run.fp8
  lines = capsys.readouterr().out.splitlines()
  assert lines == [
    f'{tmp_path}/run/metrics.jsonl: left out {len(BAD)} bad rows.'
  ]


def test_texts_and_their_held_out_numbers_are_in_the_report(
  tmp_path, monkeypatch
):
  from matplotlib import pyplot

  rows = [*GOOD[:20], evaluation(10, 3.0) | {'bits_per_byte/web': 2.5}]
  folder = write(tmp_path / 'run', [*rows, evaluation(20, 2.9)])
  assert '<h2>Texts</h2>' not in report.write(folder).read_text()
  table = [['tokens', '1,234']]
  texts = [{'source': '<web>', 'epochs': 0.5, 'table': table}]
  of_text = [*table, ['documents', '77']]  # which ids have not
  texts.append({'source': 'b', 'epochs': 2.0, 'table': of_text})
  start = {'step': 0, 'date': '2026-11-29', 'texts': texts}
  (folder / 'starts.jsonl').write_text(json.dumps(start))
  last = evaluation(30, 2.8) | {'bits_per_byte/web': 2.4}
  with open(folder / 'metrics.jsonl', 'a', encoding='utf-8') as file:
    file.write(json.dumps(last | {'bits_per_byte/code': 'x'}))
  text = report.write(folder).read_text()
  for cell in ('&lt;web&gt;', '1,234', '0.5', '-', '77'):
    assert f'<td>{cell}</td>' in text
  monkeypatch.setattr(page, 'svg', lambda figure: pyplot.close(figure) or '')
  for bad in (3, [{}], [{'source': 1, 'epochs': 'x', 'table': 4}]):
    (folder / 'starts.jsonl').write_text(json.dumps(start | {'texts': bad}))
    assert '<h2>Texts</h2>' not in report.write(folder).read_text()


def test_indexers_have_a_curve_a_layer(monkeypatch):
  """And a run without one has no section."""
  lines = []
  monkeypatch.setattr(
    report, '_over_steps', lambda _, axes: lines.extend(map(curves, axes[0]))
  )
  curves = lambda plot: [line.get_ydata().tolist() for line in plot.lines]
  index = {'index_kl': [0.2, 0.1], 'index_mass': [0.8, 0.9]}
  index['index_overlap'] = [1.0, 0.4]
  rows = [step(n, **index) for n in (1, 2, 3)]
  good = history.drawable([*rows, step(4, index_kl=[0.1])], 'loss')
  assert len(good) == 3
  assert '<h2>Sparse attention</h2>' in report._indexers(good)
  assert lines == [[[x] * 3 for x in values] for values in index.values()]
  assert report._indexers(GOOD[:3]) == []


@pytest.mark.filterwarnings('error')
def test_a_warm_up_has_the_norm_of_its_indexers(tmp_path, monkeypatch):
  """All else has the norm 0, which no log scale shows."""
  scales = []
  seen = lambda figure: scales.append(
    [(x.get_yscale(), len(x.lines)) for x in figure.axes]
  )
  monkeypatch.setattr(page, 'svg', lambda figure: seen(figure) or '')
  warm = [step(n, grad_norm=0.0, index_grad_norm=1 / n) for n in (1, 2)]
  no_norm = [step(n, grad_norm=0.0) for n in (1, 2)]
  for rows in (warm, no_norm, GOOD[:3]):
    report._learning(history.drawable(rows, 'loss'), [])
  assert [s[3] for s in scales] == [('log', 2), ('linear', 1), ('log', 1)]
  run = history.read(write(tmp_path / 'run', no_norm))
  figure = comparison.draw([run], ['x'], ['k'])
  assert {x.get_yscale() for x in figure.axes} == {'linear'}


def test_numbers_that_are_not_finite_are_gaps(tmp_path):
  rows = [step(1), step(2, main_loss=None, grad_norm=math.inf), step(3)]
  run = history.read(write(tmp_path / 'run', rows))
  losses = [row['main_loss'] for row in run.steps]
  assert np.isnan(losses).tolist() == [False, True, False]
  assert math.isnan(run.steps[1]['grad_norm'])
  with pytest.raises(ConfigError, match='holds no metrics.jsonl of a run'):
    history.read(write(tmp_path / 'none', BAD[:7]))


def test_bad_rows_of_loads_are_left_out_and_counted(tmp_path, capsys):
  folder = write(tmp_path / 'run', GOOD)
  bad = [{'load': [[1, 3], [2, 2]]}, {'step': '3', 'load': [[1, 3], [2, 2]]}]
  bad += [{'step': 3, 'load': x} for x in ([1, 2], [[1], [2, 3]], 'a', [[1]])]
  with open(folder / 'load.jsonl', 'a', encoding='utf-8') as file:
    file.writelines(f'{json.dumps(row)}\n' for row in [*bad, {'step': 4}])
  assert [row['step'] for row in history.loads(folder)] == [1, 2]
  assert capsys.readouterr().out.endswith('load.jsonl: left out 7 bad rows.\n')


JSON = st.recursive(
  st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
  lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=2),
  max_leaves=5,
)


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
  changes=st.lists(
    st.tuples(
      st.integers(0, 5), st.sampled_from([*GOOD[0], 'bits_per_byte']), JSON
    )
  )
)
def test_rows_of_a_kind_stack_to_arrays(changes):
  """The property that every figure needs of the rows that are drawn."""
  rows = [dict(row) for row in GOOD[:6]]
  for i, name, value in changes:
    rows[i][name] = value
  rows = [row for row in rows if type(row['step']) is int]
  for kind in ('loss', 'bits_per_byte'):
    found = history.drawable([row for row in rows if kind in row], kind)
    for name in (*history._NUMBERS[kind], *VIO, 'entropy', 'mfu'):
      values = [row[name] for row in found if name in row]
      if values:
        assert np.array(values, float).ndim == 1 + (type(values[0]) is list)
        assert len(values) == len(found) or name == 'mfu'


def test_a_comparison_has_where_runs_ran_and_the_fields_that_differ(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(comparison, 'draw', lambda *_: None)  # has its own test
  monkeypatch.setattr(page, 'svg', lambda _: '')
  for name, rate, mesh in (('_a', 1e-3, 16), ('b$x$<i>', 3e-3, 8)):
    optim = {'learning_rate': rate, 'phases': [['constant', 1.0, 1.0]]}
    folder = tmp_path / 'sweep' / name
    write(folder, GOOD, optim=optim, mesh={'fsdp': mesh})
  found = comparison.runs_in(tmp_path / 'sweep')
  path = comparison.write(found)
  assert path == tmp_path / 'sweep' / 'comparison.html'
  text = path.read_text(encoding='utf-8')
  top, below = text.split('<h2>Curves</h2>')
  for fact in ('2026-11-29 12:00:00 UTC', 'jax 0.10.2, flax 0.12.8'):
    assert top.count(fact) == 2
  for fact in ('commit abc1234', 'fsdp=16', '16 x TPU v5e', 'b$x$&lt;i&gt;'):
    assert fact in top
  fields = below.split('<h2>Config fields that differ</h2>')[1]
  assert fields.count('<tr>') == 3
  assert '<td>optim.learning_rate</td><td>0.001</td><td>0.003</td>' in fields
  assert '<td>mesh.fsdp</td><td>16</td><td>8</td>' in fields
  assert '<i>' not in text and '<script' not in text


def test_curves_of_runs_are_over_each_other_by_tokens(tmp_path):
  long = [step(n, tokens=640 * n) for n in range(1, 21)] + [evaluation(10, 2.9)]
  paths = [write(tmp_path / 'a', GOOD), write(tmp_path / 'b', long)]
  runs = [history.read(path) for path in paths]
  figure = comparison.draw(runs, ['_a', '$b'], ['#000', '#fff'])
  loss, text, *_ = figure.axes
  assert [line.get_xdata()[-1] for line in loss.lines] == [1280, 12800]
  bits = np.array([row['main_loss'] for row in long[:-1]]) / np.log(2)
  np.testing.assert_allclose(loss.lines[1].get_ydata(), bits)
  assert [line.get_xdata()[0] for line in text.lines] == [640, 6400]
  figure.draw_without_rendering()
  (legend,) = figure.legends
  assert [t.get_text().strip() for t in legend.get_texts()] == ['_a', '$b']
  box = legend.get_window_extent()
  assert not any(box.overlaps(plot.get_window_extent()) for plot in figure.axes)


def test_legends_of_a_report_are_off_its_curves(tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(page, 'svg', lambda figure: figures.append(figure) or '')
  health = {'fp8_layers': {f'x_{n}': [0.1, 0.2] for n in ('error', 'range')}}
  rows = [*BAD, *GOOD, *({'step': n, **health} for n in (1, 2))]
  report.write(write(tmp_path / 'run', rows))
  assert len(figures) == 4
  count = 0
  for figure in figures:
    figure.draw_without_rendering()
    plots = [plot.get_window_extent() for plot in figure.axes]
    for plot in figure.axes:
      if plot.get_legend():
        count += 1
        box = plot.get_legend().get_window_extent()
        assert not any(box.overlaps(other) for other in plots)
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
  assert count >= 4


def test_the_command_line_takes_a_run_runs_or_a_sweep(
  tmp_path, monkeypatch, capsys
):
  sweep = tmp_path / 'sweep'
  a, b = (write(sweep / name, GOOD[:2]) for name in 'ab')
  write(sweep / 'begun', [])
  calls = []
  monkeypatch.setattr(report, 'write', lambda x: calls.append(x))
  monkeypatch.setattr(comparison, 'write', lambda x: calls.append(x))
  for names in ([a], [a, b], [sweep]):
    monkeypatch.setattr('sys.argv', ['report', *map(str, names)])
    report.main()
  assert calls == [a, [a, b], [a, b]]
  monkeypatch.setattr('sys.argv', ['report'])
  with pytest.raises(SystemExit) as ended:
    report.main()
  assert ended.value.code == 2
  assert 'DIR [DIR ...]' in capsys.readouterr().err
