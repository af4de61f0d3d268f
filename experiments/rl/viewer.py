"""A viewer of answers: a question with its G answers, and a slider over steps.

A model's text is hostile to the page that shows it. It lies in the page as
JSON, whose `<`, `>` and `&` are escapes, so that no text can end the element;
the script puts it on the screen as text, never as HTML. A character that does
not print (NUL, a mark that turns the direction of writing) is shown by its
escape. A long answer loses its middle, because the result is at the end.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import unicodedata

from .. import history, workdir

_GROUPS = 200  # at most, evenly spaced over the run
_LENGTH = 64_000  # characters of a group's answers together
_SHORTEST = 200
# Unicode's control, format, surrogate, unassigned and separating characters.
_UNSEEN = {'Cc', 'Cf', 'Cs', 'Co', 'Cn', 'Zl', 'Zp'}
_RARE = re.compile(r'[^ -~\n\t]')  # all of them, and letters beyond ASCII

_STYLE = """
#slide{display:flex;gap:14px;align-items:center}#slide input{flex:1}
#slide output{min-width:15em;font-variant-numeric:tabular-nums}
#view article{background:var(--card);border:1px solid var(--line);
border-left:6px solid var(--line);border-radius:10px;padding:8px 14px;
margin:10px 0}
#view article.up{border-left-color:#0072B2}
#view article.down{border-left-color:#D55E00}
#view header{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:baseline;
font-size:14px}
#view mark{background:none;color:inherit;border:1px solid;border-radius:8px;
padding:0 8px;font-size:12px}
#view .soft{color:var(--soft)}
#view pre{border:0;padding:6px 0 0;margin:0;max-height:22em;overflow:auto;
background:none}
#view #question pre{border:1px solid var(--line);padding:10px 14px;
background:var(--card)}
"""

SCRIPT = """
'use strict';
const element = (tag, name, text, children = []) => {
  const result = document.createElement(tag);
  result.className = name;
  result.textContent = text;
  result.append(...children);
  return result;
};
const find = (id) => document.getElementById(id);
const groups = JSON.parse(find('groups').textContent);
const answer = (item) => element('article', item.side, '', [
  element('header', '', '', [
    element('b', '', 'reward ' + item.reward),
    element('span', '', item.advantage),
    element('span', 'soft', item.parts),
    element('span', 'soft', item.facts),
    ...item.marks.map((mark) => element('mark', '', mark)),
  ]),
  element('pre', '', item.text),
]);
const show = () => {
  const index = Number(find('group').value);
  const group = groups[index];
  find('where').textContent =
    `step ${group.step} (${index + 1} of ${groups.length})`;
  find('question').replaceChildren(element('pre', '', group.question));
  find('gold').textContent = group.gold;
  find('answers').replaceChildren(...group.answers.map(answer));
};
find('group').addEventListener('input', show);
show();
"""


def read(path: pathlib.Path) -> list[dict]:
  """Returns the groups of groups.jsonl as the page has them, of <= 200 rows.

  Prints how many rows are bad.
  """
  rows = workdir.rows(path, _GROUPS, _group)
  groups = [group for group in rows if group]
  if len(groups) < len(rows):
    print(f'{path}: left out {len(rows) - len(groups)} bad rows.')
  return groups


def parts(groups: list[dict]) -> list[str]:
  """Returns the HTML of the viewer, which needs `SCRIPT` in its page."""
  if not groups:
    return []
  last = len(groups) - 1
  data = json.dumps(groups)  # ASCII: every other character is an escape
  for character in '<>&':
    data = data.replace(character, f'\\u{ord(character):04x}')
  return [
    f'<style>{_STYLE}</style>',
    '<h2>Answers</h2>',
    '<p>A question of a step and the answers that the policy drew, by their '
    'rewards. The update makes an answer with a positive advantage (blue) '
    'likelier, and one with a negative advantage (orange) less likely.</p>',
    '<div id="slide"><input type="range" id="group" min="0" '
    f'max="{last}" value="{last}" autocomplete="off" aria-label="step">'
    '<output id="where"></output></div>',
    '<div id="view"><p>Question</p><div id="question"></div>'
    '<p>Right answer: <b id="gold"></b></p><div id="answers"></div></div>',
    '<noscript><p>The answers need JavaScript.</p></noscript>',
    f'<script type="application/json" id="groups">{data}</script>',
  ]


def _group(row: dict) -> dict | None:
  """Returns the group of a row, or None if the row is none."""
  step, answers = row.get('step'), history.clean(row.get('answers'))
  if type(step) is not int or not 0 <= step < 2**53:
    return None
  if not isinstance(answers, list) or not answers:
    return None
  if not all(map(_is_answer, answers)):
    return None
  limit = max(_LENGTH // len(answers), _SHORTEST)
  marks = _marks(answers)
  order = sorted(
    range(len(answers)),
    key=lambda i: -math.inf if math.isnan(r := answers[i]['reward']) else r,
    reverse=True,
  )
  return {
    'step': step,
    'question': _text(str(row.get('question', '')), limit),
    'gold': _text(str(row.get('gold', '')), limit),
    'answers': [_answer(answers[i], marks[i], limit) for i in order],
  }


def _is_answer(item: object) -> bool:
  if not isinstance(item, dict) or not isinstance(item.get('text'), str):
    return False
  pieces = item.get('parts', {})
  if not isinstance(pieces, dict):
    return False
  numbers = [item.get('reward'), *pieces.values()]
  names = ('advantage', 'length', 'log_ratio')
  numbers += [item[name] for name in names if name in item]
  return all(type(number) in (int, float) for number in numbers)


def _marks(answers: list[dict]) -> list[list[str]]:
  """Returns the marks of each answer: best, worst, longest.

  Of equal ones it is the first; where all are equal, none.
  """
  marks: list[list[str]] = [[] for _ in answers]
  for name, field, choose in (
    ('best', 'reward', max),
    ('worst', 'reward', min),
    ('longest', 'length', max),
  ):
    values = {i: item.get(field, math.nan) for i, item in enumerate(answers)}
    values = {i: x for i, x in values.items() if not math.isnan(x)}
    if len(set(values.values())) > 1:
      marks[choose(values, key=values.__getitem__)].append(name)
  return marks


def _answer(item: dict, marks: list[str], limit: int) -> dict:
  advantage = item.get('advantage', 0.0)
  facts = []
  if 'length' in item:
    facts.append(f'{item["length"]:,} tokens')
  if not item.get('ended', True):
    facts.append('cut, without an end')
  if 'log_ratio' in item:
    facts.append(f'mean log ratio {item["log_ratio"]:+.1e}')
  return {
    'text': _text(item['text'], limit),
    'reward': _shown(item['reward']),
    'parts': ', '.join(
      f'{_text(name, _SHORTEST)} {_shown(value)}'
      for name, value in item.get('parts', {}).items()
    ),
    'advantage': f'advantage {advantage:+.2f}',
    'facts': ' \N{MIDDLE DOT} '.join(facts),
    'side': 'up' if advantage > 0 else 'down' if advantage < 0 else '',
    'marks': marks,
  }


def _shown(value: float) -> str:
  return 'unknown' if math.isnan(value) else f'{value:.3g}'


def _text(text: str, limit: int) -> str:
  """Returns the text with its middle cut and its unseen characters shown."""
  if len(text) > limit:
    half, cut = limit // 2, len(text) - 2 * (limit // 2)
    note = f'\n[... {cut:,} characters are left out ...]\n'
    text = text[:half] + note + text[-half:]
  return _RARE.sub(lambda match: _visible(match[0]), text)


def _visible(character: str) -> str:
  if unicodedata.category(character) not in _UNSEEN:
    return character
  return character.encode('unicode_escape').decode()
