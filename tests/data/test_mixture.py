"""Mixtures: exact shares, each row once an epoch, by arithmetic on any host."""

import dataclasses
import fractions
import itertools
import types

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from texts import BOS, BYTE, prepared, small, write_folder

from experiments.data import batches, blend, corpus_folder, mixture, sources
from experiments.training import source
from mla_moe.config import Config, ConfigError, RunConfig, freeze

AB = (('a', 3.0, 'a'), ('b', 1.0, 'b'))


def mixed(weights, phases=(), **changes):
  names = 'abcdefghijklmnopqrstuvwxyzABCDEF'
  rows = [(n, w, n) for n, w in zip(names, weights, strict=False)]
  return small(sources=tuple(rows), phases=tuple(phases), **changes)


@pytest.fixture(scope='module')
def streams():
  """Three streams whose tokens say of which source and row they are."""
  rows = lambda s, count: np.repeat(np.arange(count) * 4 + s, 8)
  return [np.append(rows(s, n), 0).astype(np.uint16) for s, n in enumerate(
    (50, 90, 40)
  )]  # fmt: skip


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.example(weights=[0.001] * 31 + [0.1], seed=0, block=3)
@hypothesis.example(weights=[1.0] * 32, seed=1, block=10**6)
@hypothesis.given(
  weights=st.lists(st.floats(0, 10), min_size=1, max_size=32).filter(sum),
  seed=st.integers(0, 99),
  block=st.integers(0, 10**7),
)
def test_shares_of_blocks_are_exact(weights, seed, block):
  """Within a row, and of the heaviest within one for each other source."""
  data = mixed(weights, seed=seed)
  rows = np.arange(block * 1024, (block + 1) * 1024)
  source, number = mixture.places(data, rows)
  counts = np.bincount(source, minlength=len(weights))
  before, after = (
    mixture.rows_before(data, int(rows[0]) + n) for n in (0, 1024)
  )
  np.testing.assert_array_equal(after - before, counts)
  assert (counts >= 0).all() and after.sum() == rows[-1] + 1
  for s, count in enumerate(before):  # its rows come one after the other
    np.testing.assert_array_equal(
      number[source == s], count + np.arange(counts[s])
    )
  exact = [fractions.Fraction(repr(float(w))) for w in weights]
  heaviest = max(range(len(weights)), key=weights.__getitem__)
  for s, share in enumerate(exact):
    off = int(after[s]) - share * (block + 1) * 1024 / sum(exact)
    assert (0 <= off < len(weights)) if s == heaviest else (-1 < off <= 0)


def test_a_block_is_well_mixed():
  source, _ = mixture.places(mixed([0.5, 0.3, 0.2]), np.arange(1024))
  parts = [np.bincount(x, minlength=3) / 128 for x in np.split(source, 8)]
  np.testing.assert_allclose(parts, [[0.5, 0.3, 0.2]] * 8, atol=0.15)


def test_phases_change_the_shares_and_no_row_comes_twice():
  """Bounds in the middle of a block; one source has no part in the first."""
  phases = [(8 * 700.0, (0.0, 1.0, 3.0)), (8 * 2900.0, (1.0, 1.0, 0.0))]
  data = mixed([2.0, 2.0, 0.0], phases)
  source, number = mixture.places(data, np.arange(5000))
  for s in range(3):
    np.testing.assert_array_equal(
      number[source == s], np.arange((source == s).sum())
    )
  assert (source[:700] != 2).all() and (source[700:2900] != 0).all()
  assert (source[2900:] != 2).all()
  counts = np.bincount(source[700 : 700 + 2048], minlength=3)
  np.testing.assert_array_equal(counts, [0, 512, 1536])
  for rows in (0, 1, 699, 700, 701, 2899, 2900, 5000):
    np.testing.assert_array_equal(
      mixture.rows_before(data, rows), np.bincount(source[:rows], minlength=3)
    )


def test_one_source_is_the_stream_bit_for_bit(text):
  one = small(sources=((text.fingerprint, 0.7, 'all'),))
  for step, left_out in itertools.product((0, 2, 40, 1000), (0, 5)):
    ours = mixture.batch_at([text.train], one, step, BOS, left_out=left_out)
    right = batches.batch_at(text.train, small(), step, BOS, left_out=left_out)
    for a, b in zip(ours, right, strict=True):
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('packing', ['joined', 'separate'])
def test_hosts_share_the_mixed_batch_and_a_resume_needs_no_state(
  packing, streams
):
  """Any step alone is the step of the run, before and after a phase begins."""
  data = mixed([3.0, 2.0, 1.0], [(8 * 100.0, (0.0, 1.0, 1.0))], batch_size=16)
  data = dataclasses.replace(data, micro_batch=8, packing=packing)
  for step in (0, 6, 7, 30, 200):
    full = mixture.batch_at(streams, data, step, BOS)
    for hosts in (2, 8):
      for host in range(hosts):
        rows = np.split(np.arange(8), hosts)[host]
        part = mixture.batch_at(streams, data, step, BOS, rows)
        for ours, whole in zip(part[:4], full[:4], strict=True):
          np.testing.assert_array_equal(ours, whole[:, rows])


def test_each_epoch_of_a_source_has_each_of_its_rows_once(streams):
  data = mixed([1.0, 1.0, 2.0], [(8 * 150.0, (1.0, 3.0, 0.0))])
  rows = [mixture.batch_at(streams, data, step, BOS) for step in range(60)]
  seen = np.concatenate([batch.tokens[0, :, 0] for batch in rows])
  for s, stream in enumerate(streams):
    own, total = seen[seen % 4 == s] // 4, len(stream) // 8
    assert len(own) == mixture.rows_before(data, 360)[s]
    for first in range(0, len(own), total):
      epoch = own[first : first + total]
      assert len(set(epoch)) == len(epoch)
    assert len(set(own[:total])) == min(total, len(own))
  epochs = mixture.epochs(data, streams, 360)
  lengths = dict(a=50, b=90, c=40)
  assert epochs == {
    name: mixture.rows_before(data, 360)[s] / lengths[name]
    for s, name in enumerate('abc')
  }


def test_epochs_above_the_limit_and_phases_after_the_run_are_refused(streams):
  """The right value passes, and the next one is one line with the fix."""
  run = RunConfig(steps=60)
  config = lambda **changes: Config(data=mixed([1, 1, 2], **changes), run=run)
  most = max(mixture.epochs(config().data, streams, 360).values())
  blend.check(config(max_epochs=most), streams)
  line = rf"data.max_epochs=4: the 60 steps read source 'c' {most:.3g} times;"
  line += ' give more of its text, or lower its weight or run.steps$'
  with pytest.raises(ConfigError, match=line):
    blend.check(config(max_epochs=4), streams)
  last = lambda tokens: config(phases=[(tokens, (1, 1, 1))])
  blend.check(last(60 * 48 - 1), streams)
  with pytest.raises(ConfigError, match='after 2,880 tokens, and the run has'):
    blend.check(last(60 * 48), streams)
  alone = Config(data=small(max_epochs=0.5), run=RunConfig(steps=5))
  with pytest.raises(ConfigError, match="data.source='stdlib' 0.6 times"):
    blend.check(alone, streams[:1])


BAD = [
  (dict(sources=(('a', 0.0, 'a'), ('b', 0.0, 'b'))), 'one above 0'),
  (dict(sources=(('a', -1.0, 'a'), ('b', 2.0, 'b'))), '0 or more'),
  (dict(sources=(('a', float('inf'), 'a'),)), '0 or more'),
  (dict(sources=(('a', True, 'a'),)), 'path, weight, name'),
  (dict(sources=(('a', 1.0, 'a'), ('b', 1.0, 'a'))), 'different words'),
  (dict(sources=(('a', 1.0, 'a b'),)), 'different words'),
  (dict(sources=(('a', 1.0),)), 'path, weight, name'),
  (dict(sources=tuple((str(i), 1.0, str(i)) for i in range(33))), 'up to 32'),
  (dict(sources=AB, source='text'), 'leave it out'),
  (dict(phases=((9.0, (1.0,)),)), 'for each source'),
  (dict(sources=AB, phases=((9.0, (1.0,)),)), 'for each source'),
  (dict(sources=AB, phases=((9.0, (0.0, 0.0)),)), 'one above 0'),
  (
    dict(sources=AB, phases=((9.0, (1.0, 0.0)), (8.0, (0.0, 1.0)))),
    'tokens of phases rise',
  ),
  (dict(max_epochs=-1.0), 'negative'),
  (dict(sources=AB, validation=(('c', 'a'),)), 'all names different'),
  (dict(validation=(('c', 'a', 'b'),)), 'path, name'),
]


@pytest.mark.parametrize('data, words', BAD)
def test_a_wrong_mixture_is_one_line(data, words):
  with pytest.raises(ConfigError, match=words) as error:
    freeze({'data': data})
  assert '\n' not in str(error.value) and 'data.' in str(error.value)


def test_a_mixture_survives_json():
  phases = [[9.0, [1.0, 2.0]]]
  config = freeze(
    {'data': {'sources': [list(x) for x in AB], 'phases': phases}}
  )
  assert config.data.sources == AB
  assert config.data.phases == ((9.0, (1.0, 2.0)),)


@pytest.mark.parametrize('kind', ['sources', 'validation'])
def test_an_error_names_the_field_of_its_text(kind, tmp_path):
  """Never data.source where that is not set; the class of error stays."""
  (tmp_path / 'words.txt').write_text('short')
  rows = {'absent': 'gone', 'words.txt': 'short', 'x.doc': 'odd'}
  (tmp_path / 'x.doc').write_text('odd')
  for path, name in rows.items():
    place = str(tmp_path / path)
    row = (place, 1.0, name) if kind == 'sources' else (place, name)
    data = small(heldout=0.5, **{kind: (row,)})
    of = blend.singles if kind == 'sources' else blend.validations
    ((key, one),) = of(data).items()
    with pytest.raises(ConfigError) as error:
      with blend.named(f'data.{kind}', key):
        text = prepared(one, tmp_path / 'cache')
        blend.whole(text, one)
        corpus_folder.check(text, one)
    line = str(error.value)
    own = f'data.{kind}: {name}={place!r}: '
    assert line.startswith((own, f'data.validation={place!r}')), line
    assert 'data.source=' not in line
    assert isinstance(error.value, sources.Absent) == (path == 'absent')


def test_a_small_source_has_at_least_a_row(tmp_path):
  """A batch may be longer than a source, and not than a whole text."""
  path = write_folder(tmp_path / 'text')
  long = small(source=path, batch_size=10**4)
  text = prepared(long, tmp_path / 'cache')
  with pytest.raises(ConfigError, match='training tokens, but a batch needs'):
    corpus_folder.check(text, long)
  corpus_folder.check(text, long, rows=1)


def test_sources_and_validation_sets_are_evaluated_by_name(tmp_path):
  """Against each set's own batches, with a loss that tells tokens apart."""
  for name in 'ab':
    write_folder(tmp_path / name, 30 + (name == 'b'))
  (tmp_path / 'all.txt').write_text('xyz\n' * 90)
  data = small(
    sources=tuple((str(tmp_path / n), 1.0, n) for n in 'ab'),
    validation=((str(tmp_path / 'all.txt'), 'all'),),
  )
  config = Config(data=data, run=RunConfig(steps=3, eval_batches=2))
  opened = source.open_text(config, BYTE, tmp_path / 'run')
  setup = types.SimpleNamespace(
    evaluate=lambda _, b, base: {
      'nll': b.targets[b.targets >= 0].sum() * np.log(2)
    },
    base=types.SimpleNamespace(params=None),
    place=lambda batch: batch,
    byte_lengths=np.ones(BYTE.vocab, np.int64),
  )
  row, line = opened.evaluate(setup, 1, None)
  right = {}
  for name, one in (blend.singles(data) | blend.validations(data)).items():
    text = prepared(one, tmp_path / '.corpus')
    stream = text.heldout
    if name == 'all':
      stream = np.concatenate([text.train[:], text.heldout[:]])
      assert len(stream) > 4 * len(text.heldout) / 3 > 0
    parts = batches.eval_batches(stream, data, BOS, 2)
    ids = np.concatenate([b.targets[b.targets >= 0] for b in parts])
    right[f'bits_per_byte/{name}'] = ids.mean()
  assert {n: row[n] for n in right} == pytest.approx(right)
  own = [right[f'bits_per_byte/{name}'] for name in 'ab']
  assert row['bits_per_byte'] == pytest.approx(np.mean(own))
  assert 'a ' in line and 'all ' in line
  assert [x['source'] for x in opened.table] == ['a', 'b']
  alone = dataclasses.replace(data, sources=(), source=str(tmp_path / 'a'))
  opened = source.open_text(
    dataclasses.replace(config, data=alone), BYTE, tmp_path / 'run'
  )
  row, _ = opened.evaluate(setup, 1, None)
  assert row['bits_per_byte'] == pytest.approx(right['bits_per_byte/a'])
  assert set(row) == {
    'bits_per_byte',
    'bits_per_byte/all',
    'gzip_bits_per_byte',
  }


def test_a_validation_set_has_a_row(tmp_path):
  path = tmp_path / 'short.txt'
  path.write_text('abc')
  data = small(validation=((str(path), 'short'),))
  (one,) = blend.validations(data).values()
  text = prepared(one, tmp_path / 'cache')
  with pytest.raises(ConfigError, match='data.validation=.* a row needs 9'):
    blend.whole(text, one)
