"""The held-out side: a fraction of any text, by whole lines, nothing lost."""

import hypothesis
import pytest
from hypothesis import strategies as st
from texts import BYTE, documents_of, small

from experiments.data import corpus, documents, holdout

content = lambda row: bytes(row[1:-1]).decode()


def split(folder, cache, heldout, lines):
  """Returns the texts of both sides, documents joined; adds printed lines."""
  config = small(source=str(folder), heldout=heldout)
  text = corpus.prepare(config, BYTE, cache, lines.append)
  assert text.prompt == content(documents_of(text.heldout)[0])[:400]
  rows = documents_of(text.train), documents_of(text.heldout)
  return [''.join(map(content, side)) for side in rows]


@pytest.mark.parametrize(
  'names',
  [
    ('input.txt', 'README.md'),
    ('book.txt', 'notes.txt'),
    ('train.txt', 'val.txt'),
    ('book.txt',),
    ('a.txt', 'b.txt', 'c.txt', 'd.txt', 'e.txt'),
  ],
)
def test_of_a_book_and_a_note_the_fraction_is_held_out(names, tmp_path):
  folder, lines = tmp_path / 'text', []
  folder.mkdir()
  for name, size in zip(names, (900_000, 3_000, 10, 400, 5_000), strict=False):
    line = f'{name} has a line of text here\n'
    (folder / name).write_text((line * (size // len(line) + 1))[:size])
  train, heldout = split(folder, tmp_path / 'cache', 0.02, lines)
  part = len(heldout) / (len(train) + len(heldout))
  assert 0.01 < part < 0.04
  assert f'{part:.1%} of the text is held out.' in lines[-1]


@pytest.mark.parametrize('count', [1, 2, 30])
def test_of_a_small_text_some_is_held_out(tmp_path, count):
  """1e-6 holds out no key: a tenth of so small a text is taken."""
  rows = [f'line {i} of a small book\n' for i in range(30)]
  folder, lines = tmp_path / 'text', []
  folder.mkdir()
  for i in range(count):
    (folder / f'{i}.txt').write_text(''.join(rows[i::count]))
  sides = split(folder, tmp_path / 'cache', 1e-6, lines)
  assert sorted(''.join(sides).splitlines(True)) == sorted(rows)
  assert 2 <= len(sides[1].splitlines()) <= 4
  assert 'ATTENTION' in lines[-1] and 'data.heldout=1e-06' in lines[-1]


def test_a_document_that_outweighs_the_others_is_said(tmp_path):
  """Rows cannot be weighed before they are many: the line says the part."""
  folder, lines = tmp_path / 'text', []
  folder.mkdir()
  rows = [f'{{"text": "row {i}"}}\n' for i in range(600)]
  low = min(range(600), key=lambda i: key_of(f'row {i}'))
  rows[low] = f'{{"text": "{LOW * 5000}"}}\n'
  (folder / 'rows.jsonl').write_text(''.join(rows))
  train, heldout = split(folder, tmp_path / 'cache', 0.02, lines)
  assert len(heldout) > len(train)
  assert lines[-1].startswith('ATTENTION: 600 documents; ')


def key_of(text):
  return documents._document(text.encode(), text.encode()).key


LOW = next(w for w in map(str, range(10_000)) if key_of(w * 5000) < 2**56)


@hypothesis.given(
  pairs=st.lists(
    st.tuples(st.integers(0, 3), st.text('ab \n', min_size=1, max_size=200)),
    min_size=1,
    max_size=12,
  ),
  fraction=st.sampled_from([1e-6, 0.02, 0.5, 0.9]),
)
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.example(pairs=[(0, 'aa')], fraction=0.9)
def test_sides_lose_nothing_and_neither_is_empty(pairs, fraction):
  """In any text of more than one character; equal keys stay on one side."""
  texts = [documents.Document(key * 2**62, text, 0, 0) for key, text in pairs]
  (sides,) = holdout.sides(iter(texts), fraction)
  assert ''.join(d.text for d, _ in sides) == ''.join(d.text for d in texts)
  heldout = sum(len(d.text) for d, is_heldout in sides if is_heldout)
  total = sum(len(d.text) for d in texts)
  assert 0 < heldout and (heldout < total or total == 1)
  again = holdout.sides(iter(texts), fraction)
  assert next(again) == sides
  keys = [d.key for d in texts]
  single = sum(len(d.text) for d in texts if keys.count(d.key) == 1)
  if single > max(fraction, 0.1) * total / 2:
    for key in {*keys}:
      apart = {is_heldout for d, is_heldout in sides if d.key == key}
      assert len(apart) == 1 or keys.count(key) == 1
