"""Reports of reinforcement learning: alarms, charts, and the viewer's safety.

The rows are as a run writes them; no model is trained here.
"""

import base64
import hashlib
import html.parser
import json
import math

import numpy as np
import pytest

from experiments import comparison, history, page, report
from experiments.rl import alarms, charts, viewer

pytest.importorskip('matplotlib')
FINE = {'step': 1, 'zero_right': 0.2, 'zero_wrong': 0.3, 'entropy': 2.0}
FINE |= {'ended': 0.9, 'mismatch_k3': 1e-6, 'grader_errors': 0.0}


def lines(rows):
  """The alarms that each row begins."""
  seen = alarms.Alarms()
  return [seen.see(row) for row in rows]


@pytest.mark.parametrize(
  'change, words',
  [
    ({'entropy': 0.19}, 'entropy is 0.19'),
    ({'ended': 0.49}, '49% of the answers ended'),
    ({'mismatch_k3': 0.011}, 'k3 = 0.011'),
    ({'mismatch_k3': math.nan}, 'k3 = nan'),
    ({'grader_errors': 0.06}, 'failed on 6%'),
  ],
)
def test_an_alarm_is_one_line_until_it_has_ended(change, words):
  bad = FINE | change
  assert not any(lines([FINE, FINE]))
  got = lines([FINE, bad, bad, {'step': 2, 'pass_at_1': 0.5}, FINE, bad])
  assert [len(x) for x in got] == [0, 1, 0, 0, 0, 1]
  assert words in got[1][0] and got[1] == got[5]
  for name in change:  # the limit itself is no alarm
    limit = {'entropy': 0.2, 'ended': 0.5, 'mismatch_k3': 0.01}
    edge = FINE | {name: limit.get(name, 0.05)}
    assert not any(lines([FINE, edge]))


@pytest.mark.parametrize(
  'right, wrong, cause', [(0.9, 0.05, 'left to learn'), (0, 1, 'too weak')]
)
def test_twenty_rollouts_without_spread_are_an_alarm(right, wrong, cause):
  flat = FINE | {'zero_right': right, 'zero_wrong': wrong}
  got = lines([flat] * 19 + [FINE] + [flat] * 21)
  assert [i for i, x in enumerate(got) if x] == [39]
  assert cause in got[39][0]


def test_alarms_resume_from_the_rows_alone():
  flat = FINE | {'zero_right': 1.0, 'zero_wrong': 0.0, 'ended': 0.1}
  rows = [FINE] + [flat] * 22 + [FINE | {'entropy': 0.1}, {'loss': None}] * 2
  whole = lines(rows)
  assert sum(map(len, whole)) == 3
  for cut in range(len(rows)):
    resumed = alarms.Alarms.after(rows[:cut])
    assert [resumed.see(row) for row in rows[cut:]] == whole[cut:]


NUMBERS = {
  **{'loss': 0.0, 'grad_norm': 0.5, 'lr': 1e-5, 'skipped': 0, **FINE},
  **{'reward_std': 0.4, 'completion_length': 9.5, 'length_max': 14},
  **{'kl': 0.01, 'kl_old': 0.0, 'clipped': 0.1, 'ratio_max': 1.5},
  **{'dropped': 0.0, 'mismatch_max': 1e-6, 'mismatch_extreme': 0.0},
}


def step(number, **more):
  """A row of metrics.jsonl."""
  reward = 1 - 1 / number
  return NUMBERS | {
    'step': number,
    'reward': reward,
    'rewards': {'accuracy': reward - 0.1, '$form$': 1.0},
    'seconds': {'rollout': 1.0, 'grade': 0.1, 'score': 0.2, 'update': 2.0},
    **more,
  }


def write(folder, rows, groups=()):
  """A run's folder with these rows."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in (('metrics', rows), ('groups', groups)):
    text = ''.join(f'{json.dumps(row)}\n' for row in content)
    (folder / f'{name}.jsonl').write_text(text, encoding='utf-8')
  config = {'model': {'layers': 3, 'dense_layers': 1}, 'name': folder.name}
  (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
  return folder


PASSES = [{'step': n, 'pass_at_1': n / 20} for n in (5, 10)]
RUN = [*(step(n) for n in range(1, 11)), *PASSES]
HOSTILE = [
  '</script><script>alert(1)</script>',
  '<!--<script>',
  '<img src=x onerror=alert(1)>',
  '&lt;b&gt; "\'` \\u003c',
  'a\x00b\u202ec\ud800d\u2028e\x1b[31m',
  '思考 é 🙂\n\tend',
]


def answer(text, reward=1.0, **more):
  parts = {'accuracy': reward}
  first = {'text': text, 'reward': reward, 'parts': parts, 'advantage': 0.5}
  return first | {'length': 3, 'ended': True, 'log_ratio': 1e-4} | more


def group(number, *answers):
  first = {'step': number, 'question': '31>', 'gold': '13'}
  return first | {'answers': list(answers)}


class Elements(html.parser.HTMLParser):
  """The elements of a page, and the texts of its scripts, as a browser's."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.scripts, self.policy = [], [], ''
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    assert not any(name.startswith('on') for name, _ in attrs)
    if ('http-equiv', 'Content-Security-Policy') in attrs:
      self.policy = dict(attrs)['content']
    if tag == 'script':
      self.scripts.append('')

  def handle_data(self, data):
    if self.tags and self.tags[-1] == 'script':
      self.scripts[-1] += data


def test_hostile_text_stays_text(tmp_path, monkeypatch):
  monkeypatch.setattr(page, 'svg', lambda figure: '')
  monkeypatch.setattr(charts, 'draw', lambda *_: [None, None])
  answers = [answer(text, parts={text: 1.0}) for text in HOSTILE]
  rows = [group(1, *answers) | {'question': HOSTILE[0], 'gold': HOSTILE[2]}]
  path = report.write(write(tmp_path / 'run', RUN, rows))
  text = path.read_text(encoding='utf-8')
  assert not set(text) & set('\x00\u202e\u2028\x1b')
  found = Elements(text)
  assert 'img' not in found.tags and '<!--' not in text
  data, script = found.scripts
  assert script == viewer.SCRIPT and 'innerHTML' not in script
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert f"script-src 'sha256-{digest}';" in found.policy
  assert "default-src 'none'" in found.policy
  (shown,) = json.loads(data)
  assert shown['question'] == HOSTILE[0] and shown['gold'] == HOSTILE[2]
  texts = [item['text'] for item in shown['answers']]
  escaped = 'a\\x00b\\u202ec\\ud800d\\u2028e\\x1b[31m'
  assert texts == [*HOSTILE[:4], escaped, HOSTILE[5]]
  assert [x['parts'] for x in shown['answers']] == [f'{x} 1' for x in texts]


def test_a_page_without_answers_runs_no_script(tmp_path, monkeypatch):
  monkeypatch.setattr(page, 'svg', lambda figure: '')
  monkeypatch.setattr(charts, 'draw', lambda *_: [None, None])
  text = report.write(write(tmp_path / 'run', RUN)).read_text(encoding='utf-8')
  found = Elements(text)
  assert not found.scripts and "script-src 'none';" in found.policy


def test_answers_are_in_the_order_of_their_rewards_and_marked():
  items = [
    answer('a', 0.1, length=9, advantage=-0.5),
    answer('b', 1.0, ended=False),
    answer('c', None, advantage=0.0),
    answer('d', 1.0),
    answer('e', 0.0, length=9),
  ]
  shown = viewer._group(group(7, *items))
  assert [x['text'] for x in shown['answers']] == list('bdaec')
  marks = [x['marks'] for x in shown['answers']]
  assert marks == [['best'], [], ['longest'], ['worst'], []]
  assert [x['side'] for x in shown['answers']] == ['up', 'up', 'down', 'up', '']
  assert shown['answers'][4]['reward'] == 'unknown'
  assert shown['answers'][0]['facts'].split(' · ') == [
    *('3 tokens', 'cut, without an end', 'mean log ratio +1.0e-04')
  ]
  alike = viewer._group(group(7, answer('a'), answer('b')))
  assert [x['marks'] for x in alike['answers']] == [[], []]


def test_a_long_answer_loses_its_middle():
  text = 'a' * 500_000 + 'b' * 500_000
  (item,) = viewer._group(group(1, answer(text)))['answers']
  head, note, tail = item['text'].split('\n')
  assert head == 'a' * 32_000 and tail == 'b' * 32_000
  assert note == '[... 936,000 characters are left out ...]'
  many = viewer._group(group(1, *[answer(text)] * 64))['answers']
  assert sum(len(x['text']) for x in many) < 70_000


_NUMBERS = ('reward', 'advantage', 'length', 'log_ratio')
BAD = [
  *({}, {'step': '1'}, group(-1, answer('a')), group(1), group(1, 'a')),
  group(1) | {'answers': {'text': 'a'}},
  *(group(1, answer('a'), answer('a', **{name: 'x'})) for name in _NUMBERS),
  group(1, answer(3)),
  group(1, answer('a', parts=[1])),
  group(1, answer('a', parts={'x': 'y'})),
]


def test_groups_are_few_and_bad_ones_are_counted(tmp_path, capsys):
  rows = [group(n, answer('a')) for n in range(1000)]
  path = write(tmp_path / 'run', [], rows) / 'groups.jsonl'
  steps = [x['step'] for x in viewer.read(path)]
  assert 100 <= len(steps) <= 200 and set(np.diff(steps)) == {8}
  assert not capsys.readouterr().out
  path = write(tmp_path / 'run', [], [*rows[:3], *BAD]) / 'groups.jsonl'
  assert len(viewer.read(path)) == 3
  assert f'left out {len(BAD)} bad rows' in capsys.readouterr().out
  assert viewer.parts(viewer.read(tmp_path / 'none.jsonl')) == []


def test_rows_of_a_reward_that_cannot_be_drawn_are_left_out(tmp_path, capsys):
  bad = [
    *(step(5, **{name: 'x'}) for name in (*NUMBERS, 'reward', 'rewards')),
    *(
      step(5, entropy={'a': 1.0}),
      step(5, seconds=None),
      step(5, rewards={'a': 'b'}),
    ),
    {'step': 5, 'pass_at_1': 'x'},
  ]
  bad = [row for row in bad if row['step'] == 5]
  run = history.read(write(tmp_path / 'run', [*bad, *RUN, {'step': 1}]))
  assert run.is_rl and [row['step'] for row in run.steps] == [*range(1, 11)]
  assert run.passes == PASSES and not run.evaluations
  assert f'left out {len(bad)} bad rows' in capsys.readouterr().out
  few = [{'step': 1, 'reward': None}, {'step': 1, 'pass_at_1': 0.5}]
  few[1] |= {'pass_at_8': 'x', 'pass_at_k': [1]}  # not drawn
  few = history.read(write(tmp_path / 'few', few))
  assert math.isnan(few.steps[0]['reward'])
  assert len(charts.draw(few.steps, few.passes)) == 2


def test_a_rollout_may_be_in_the_row_of_its_first_update(tmp_path):
  plain = {'loss': 0.1, 'main_loss': 0.1, 'tokens': 9, 'clipped': 0.2}
  plain |= {'entropy': [1.0, 2.0]}  # of two routers
  rows = [step(n) if n % 4 == 1 else plain | {'step': n} for n in range(1, 13)]
  run = history.read(write(tmp_path / 'run', rows))
  assert run.is_rl and len(run.steps) == 12
  learning, updates = charts.draw(run.steps, run.passes)
  plots = {p.get_title(): p for p in [*learning.axes, *updates.axes]}
  clipped = plots['Share of tokens without a gradient'].lines[0]
  np.testing.assert_allclose(
    clipped.get_ydata(), [0.1 if n % 4 == 0 else 0.2 for n in range(12)]
  )
  for title in ('Reward and held-out questions', 'Entropy and KL'):
    assert list(plots[title].lines[0].get_xdata()) == [1, 5, 9]
  assert len(plots['Questions that teach nothing'].patches) == 6


def test_charts_have_the_numbers_of_the_rows(tmp_path):
  run = history.read(write(tmp_path / 'run', RUN))
  learning, _ = charts.draw(run.steps, run.passes)
  plots = {plot.get_title(): plot for plot in learning.axes}
  lines = lambda title: {
    line.get_label().strip(): line.get_ydata() for line in plots[title].lines
  }
  rewards = lines('Reward and held-out questions')
  want = [1 - 1 / n for n in range(1, 11)]
  np.testing.assert_allclose(rewards['reward'], want)
  np.testing.assert_allclose(rewards['accuracy'], np.array(want) - 0.1)
  np.testing.assert_allclose(rewards['held-out pass@1'], [0.25, 0.5])
  # One part that is the whole reward would hide behind it.
  only = [row | {'rewards': {'accuracy': row['reward']}} for row in run.steps]
  (plot, *_), _ = (figure.axes for figure in charts.draw(only, run.passes))
  labels = [line.get_label().strip() for line in plot.lines]
  assert labels == ['reward', 'held-out pass@1']
  mismatch = lines('Mismatch of rollout and trainer')
  assert (mismatch['share outside [1/2, 2]: 0'] == 1e-9).all()  # of 0
  assert (mismatch['largest difference'] == 1e-6).all()
  for title, count, height in (
    ('Time of a rollout, without updates', 40, 3.3),
    ('Questions that teach nothing', 20, 0.5),
  ):
    bars = plots[title].patches
    top = max(bar.get_y() + bar.get_height() for bar in bars)
    assert len(bars) == count and top == pytest.approx(height)
  learning.draw_without_rendering()
  boxes = [plot.get_window_extent() for plot in learning.axes]
  legends = [p.get_legend() for p in learning.axes if p.get_legend()]
  assert len(legends) == 6
  for legend in legends:
    assert not any(legend.get_window_extent().overlaps(box) for box in boxes)


def test_a_comparison_has_rewards_where_runs_have_them(tmp_path, monkeypatch):
  monkeypatch.setattr(page, 'svg', lambda figure: '')
  names = ('a', 'b')
  folders = [write(tmp_path / 'sweep' / name, RUN) for name in names]
  assert comparison.runs_in(tmp_path / 'sweep') == folders
  text = comparison.write(folders).read_text(encoding='utf-8')
  head = text.split('</tr>')[0]
  assert '<th>reward</th><th>pass@1</th>' in head and 'loss' not in head
  assert text.count('<td>0.900</td><td>50.0%</td>') == 2
  plain = [
    {
      'step': n,
      'tokens': 64 * n,
      'loss': 2.0,
      'main_loss': 2.0,
      'mtp_loss': 0.0,
    }
    | {'lr': 1e-3, 'grad_norm': 1.0, 'memory_mib': 1.0}
    for n in (1, 2)
  ]
  runs = [history.read(x) for x in (*folders[:1], write(tmp_path / 'c', plain))]
  figure = comparison.draw(runs, ['a', 'c'], ['#000', '#fff'])
  plots = {}
  for plot in figure.axes:
    plots.setdefault(plot.get_title(), plot)
  sizes = lambda title: [len(x.get_xdata()) for x in plots[title].lines]
  assert sizes('Reward') == [10, 0] and sizes('Loss') == [0, 2]
  assert sizes('Held-out questions') == [2, 0]
