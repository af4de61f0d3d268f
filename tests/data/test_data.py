"""Text to batches: nothing lost, nothing seen twice, nothing left to state."""

import dataclasses
import fractions
import gzip
import itertools
import json
import multiprocessing
import os
import stat

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mla_moe.config import Config, ConfigError, DataConfig, ModelConfig
from mla_moe.data import batches, corpus, documents, tokenizer

BYTE = tokenizer.load('byte', 256, 257)
BOS, EOS, BEGIN, HOLE, END = range(256, 261)


def small(**changes) -> DataConfig:
  plain = dict(seq_len=8, batch_size=6, fim_rate=0.0, heldout=0.2)
  return DataConfig(**(plain | changes))


def write_folder(folder, count=40):
  folder.mkdir()
  for i in range(count):
    text = f'{i}: ' + 'añb\n' * (3 + i % 7)
    (folder / f'{i:02}.txt').write_text(text, encoding='utf-8')
  return str(folder)


def split(stream):
  """The documents of a stream, as lists of ids with their bos and eos."""
  starts = np.flatnonzero(stream == BOS)
  return [part.tolist() for part in np.split(np.array(stream), starts[1:])]


@pytest.fixture
def folder(tmp_path):
  return write_folder(tmp_path / 'text')


@pytest.fixture
def text(folder, tmp_path):
  config = small(source=folder)
  return corpus.prepare(config, BYTE, tmp_path / 'cache', lambda line: None)


# Documents.


def test_every_file_is_one_document_on_one_side(folder, text):
  found = split(text.train) + split(text.heldout)
  assert all(d[0] == BOS and d[-1] == EOS for d in found)
  paths = [os.path.join(folder, name) for name in os.listdir(folder)]
  expected = []
  for path in paths:
    with open(path, 'rb') as file:
      expected.append([BOS, *file.read(), EOS])
  assert sorted(found) == sorted(expected)
  assert len(split(text.heldout)) > 1


@pytest.mark.parametrize('count', [1, 2, 30])
def test_of_a_small_text_some_is_held_out(tmp_path, count):
  """A share of a millionth is nobody's; the text is all there all the same."""
  lines = [f'line {i} of a small book\n' for i in range(30)]
  where = tmp_path / 'text'
  where.mkdir()
  for i in range(count):
    (where / f'{i}.txt').write_text(''.join(lines[i::count]))
  config = small(source=str(where), heldout=1e-6 if count > 1 else 0.1)
  made = corpus.prepare(config, BYTE, tmp_path / 'cache', lambda line: None)
  assert len(split(made.heldout)) == 1 and len(made.train)
  content = lambda d: bytes(d[1:-1]).decode()
  held = content(split(made.heldout)[0])
  assert made.heldout_bytes == len(held) and made.prompt == held
  every = held + ''.join(content(d) for d in split(made.train))
  assert sorted(every.splitlines(True)) == sorted(lines)


def test_a_file_keeps_its_side_when_others_come(folder, tmp_path, text):
  more = os.path.join(folder, 'more.txt')
  with open(more, 'w', encoding='utf-8') as file:
    file.write('one more')
  config = small(source=folder)
  later = corpus.prepare(config, BYTE, tmp_path / 'cache', lambda line: None)
  assert later.fingerprint != text.fingerprint
  added = [BOS, *b'one more', EOS]
  old = [d for d in split(later.heldout) if d != added]
  assert old == split(text.heldout)


def test_the_key_of_a_whole_file_is_its_name(folder):
  one, other = (documents.files(folder)[i] for i in (0, 1))
  (before,) = documents.read(one)
  with open(other.path, 'rb') as source, open(one.path, 'wb') as target:
    target.write(source.read())
  ((after,), (same,)) = (documents.read(file) for file in (one, other))
  assert after.text == same.text != before.text
  assert before.key == after.key != same.key


def test_the_default_corpus_is_the_standard_library():
  found = documents.files('stdlib')
  names = [file.name for file in found]
  assert names == sorted(names) and len(set(names)) == len(names)
  assert {'json/decoder.py', 'typing.py'} <= set(names)
  assert not any('site-packages' in name or '/test/' in name for name in names)
  assert sum(os.path.getsize(file.path) for file in found) > 5e6


def test_a_large_text_is_cut_between_characters_and_nothing_is_lost(tmp_path):
  path = tmp_path / 'one.txt'
  paragraphs = ''.join(f'{i} é東🙂\n' * 5 + '\n' for i in range(3000))
  path.write_text(paragraphs + '東' * 40000, encoding='utf-8')
  (file,) = documents.files(str(path))
  found = list(documents.read(file))
  content = path.read_text(encoding='utf-8')
  assert ''.join(document.text for document in found) == content
  assert not any(document.replaced for document in found)
  sizes = [len(document.text.encode()) for document in found]
  assert len(sizes) > 10 and max(sizes) <= 16384
  ends = [d.text.endswith('\n\n') for d in found[:-9]]
  assert all(ends)


def rows_of(kind, path, rows):
  if kind == 'jsonl':
    lines = [json.dumps({'text': row, 'other': 1}) for row in rows]
    path.write_text('\n'.join([lines[0], '', *lines[1:]]), encoding='utf-8')
  else:
    pyarrow = pytest.importorskip('pyarrow', reason='extra [data] is missing')
    parquet = pytest.importorskip('pyarrow.parquet')
    parquet.write_table(
      pyarrow.table({'text': rows, 'n': [1] * len(rows)}), path
    )


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_each_row_is_a_document_keyed_by_its_text(kind, tmp_path):
  path = tmp_path / f'rows.{kind}'
  rows_of(kind, path, ['one', 'zwei 東', 'one', '', 'x\ny'])
  found = list(documents.read(documents.files(str(path))[0]))
  assert [d.text for d in found] == ['one', 'zwei 東', 'one', 'x\ny']
  assert found[0].key == found[2].key != found[1].key


def test_globs_and_folders_take_what_can_be_read(folder):
  (os.mkdir(os.path.join(folder, 'deep')))
  for name in ('deep/a.jsonl', 'deep/b.bin', '.hidden.txt'):
    with open(os.path.join(folder, name), 'w') as file:
      file.write('{"text": "t"}\n')
  names = [file.name for file in documents.files(folder)]
  assert len(names) == 41 and 'deep/a.jsonl' in names
  found = documents.files(os.path.join(folder, '**', '*.jsonl'))
  assert [file.name for file in found] == ['deep/a.jsonl']


# Token files.


def test_a_second_call_reuses_the_files_in_silence(folder, tmp_path, text):
  path = tmp_path / 'cache' / text.fingerprint
  before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
  lines = []
  config = small(source=folder, seq_len=4, packing='separate')
  again = corpus.prepare(config, BYTE, tmp_path / 'cache', lines.append)
  assert not lines and again.fingerprint == text.fingerprint
  assert before == {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
  np.testing.assert_array_equal(again.train, text.train)
  assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize(
  'change', [dict(seed=1), dict(heldout=0.3), dict(fim_rate=0.5)]
)
def test_what_changes_the_tokens_changes_the_fingerprint(
  change, folder, tmp_path, text
):
  config = small(source=folder, **change)
  other = corpus.prepare(config, BYTE, tmp_path / 'cache', lambda line: None)
  assert other.fingerprint != text.fingerprint


@pytest.mark.parametrize('part', ['train', 'heldout'])
def test_row20_a_flipped_bit_is_found_and_named(part, folder, tmp_path, text):
  path = tmp_path / 'cache' / text.fingerprint / f'{part}.bin'
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)
  with pytest.raises(ConfigError, match=rf'{part}\.bin: MiB 0 is damaged'):
    corpus.prepare(small(source=folder), BYTE, tmp_path / 'cache', print)


def test_the_damaged_block_of_several_is_the_one_named(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus, '_BLOCK', 64)
  source = write_folder(tmp_path / 'text')
  config, cache = small(source=source), tmp_path / 'cache'
  made = corpus.prepare(config, BYTE, cache, lambda line: None)
  path = cache / made.fingerprint / 'train.bin'
  content = bytearray(path.read_bytes())
  content[64 * 5 + 1] ^= 1
  path.write_bytes(content)
  with pytest.raises(ConfigError, match='MiB 5 '):
    corpus.prepare(config, BYTE, cache, print)


def _prepare(source, cache, queue):
  made = corpus.prepare(small(source=source), BYTE, cache, lambda line: None)
  queue.put((made.fingerprint, int(made.train.astype(np.int64).sum())))


def test_two_processes_may_prepare_at_once(folder, tmp_path, text):
  context = multiprocessing.get_context('spawn')
  queue = context.Queue()
  args = (folder, str(tmp_path / 'other'), queue)
  both = [context.Process(target=_prepare, args=args) for _ in range(2)]
  for process in both:
    process.start()
  found = {queue.get(timeout=120) for _ in both}
  for process in both:
    process.join()
  assert found == {(text.fingerprint, int(text.train.astype(np.int64).sum()))}
  assert os.listdir(tmp_path / 'other') == [text.fingerprint]


def test_a_large_vocabulary_has_wider_tokens(folder, tmp_path):
  wide = dataclasses.replace(BYTE, vocab=70000, fingerprint='wide')
  config, cache = small(source=folder), tmp_path / 'cache'
  made = corpus.prepare(config, wide, cache, lambda line: None)
  narrow = corpus.prepare(config, BYTE, cache, lambda line: None)
  assert (made.train.dtype, narrow.train.dtype) == (np.uint32, np.uint16)
  np.testing.assert_array_equal(made.train, narrow.train)


def test_gzip_and_the_share_are_those_of_the_held_out_text(tmp_path):
  path, cache = tmp_path / 'rows.jsonl', tmp_path / 'cache'
  rows_of('jsonl', path, [f'{i} is {i * i} é' for i in range(3000)])
  config = small(source=str(path), heldout=0.2)
  made = corpus.prepare(config, BYTE, cache, lambda line: None)
  held = split(made.heldout)
  assert abs(len(held) / 3000 - 0.2) < 0.035  # 4.8 standard deviations
  plain = b''.join(bytes(document[1:-1]) for document in held)
  assert made.heldout_bytes == len(plain)
  bits = 8 * len(gzip.compress(plain, 9)) / len(plain)
  np.testing.assert_allclose(made.gzip_bits_per_byte, bits, rtol=1e-12)
  assert plain.decode().startswith(made.prompt[:10])


# Fill in the middle.


def test_fim_keeps_every_character_and_leaves_held_out_text_alone(
  folder, tmp_path, text
):
  config = small(source=folder, fim_rate=1.0)
  made = corpus.prepare(config, BYTE, tmp_path / 'cache', lambda line: None)
  cut, plain = split(made.train), split(text.train)
  assert len(cut) == len(plain)
  for document, original in zip(cut, plain, strict=True):
    begin, hole, end = (document.index(i) for i in (BEGIN, HOLE, END))
    assert (document[0], document[-1], begin) == (BOS, EOS, 1)
    prefix, suffix = document[2:hole], document[hole + 1 : end]
    middle = document[end + 1 : -1]
    assert prefix + middle + suffix == original[1:-1]
  np.testing.assert_array_equal(made.heldout, text.heldout)


def test_fim_rate_is_a_share_and_its_dice_are_keyed(tmp_path):
  path, cache = tmp_path / 'rows.jsonl', tmp_path / 'cache'
  rows_of('jsonl', path, [f'row number {i}' for i in range(3000)])
  config = small(source=str(path), fim_rate=0.1)
  first = corpus.prepare(config, BYTE, cache, lambda line: None)
  share = (first.train == BEGIN).sum() / (first.train == BOS).sum()
  assert abs(share - 0.1) < 0.03  # 4.9 standard deviations of 2400 dice
  other = dataclasses.replace(config, seed=1)
  second = corpus.prepare(other, BYTE, cache, lambda line: None)
  changed = [
    a != b
    for a, b in zip(*map(split, (first.train, second.train)), strict=True)
  ]
  assert 0.1 < np.mean(changed) < 0.3


# The ramp.


def slow_span(config, steps):
  """The definition, step by step, in exact arithmetic."""
  micro, first = config.micro_batch or config.batch_size, 0
  for _ in range(steps):
    size = config.batch_size
    if config.batch_start:
      seen = fractions.Fraction(first * config.seq_len)
      done = min(1, seen / fractions.Fraction(config.ramp_tokens))
      grow = config.batch_size - config.batch_start
      size = int(config.batch_start + grow * done) // micro * micro
    yield first, size
    first += size


@hypothesis.settings(
  max_examples=200, deadline=None, derandomize=True, database=None
)
@hypothesis.example(micro=1, start=1, more=26, seq_len=3, ramp=26)  # a tie
@hypothesis.given(
  micro=st.integers(1, 4),
  start=st.integers(1, 6),
  more=st.integers(0, 30),
  seq_len=st.integers(2, 9),
  ramp=st.integers(1, 3000),
)
def test_spans_follow_the_formula_without_gap_or_step_back(
  micro, start, more, seq_len, ramp
):
  config = small(
    seq_len=seq_len,
    micro_batch=micro,
    batch_start=start * micro,
    batch_size=(start + more) * micro,
    ramp_tokens=float(ramp),
  )
  spans = [batches.span(config, step) for step in range(80)]
  for first, size in spans:
    seen = fractions.Fraction(first * seq_len, ramp)
    exact = micro * start + micro * more * min(1, seen)
    # Whole when the formula gives a whole number: rounding may miss it.
    tie = fractions.Fraction(1, 10**9)
    assert size in {int(exact + d) // micro * micro for d in (-tie, 0, tie)}
  sizes = [size for _, size in spans]
  assert sizes == sorted(sizes) and sizes[0] == config.batch_start
  for (first, size), (following, _) in itertools.pairwise(spans):
    assert first + size == following


def test_the_ramp_of_deepseek_v3():
  config = DataConfig(batch_start=3072, ramp_tokens=469e9, micro_batch=512)
  expected = list(slow_span(config, 16000))
  for step in (0, 1, 999, 15638, 15639, 15640, 15999):
    assert batches.span(config, step) == expected[step]
  first, size = batches.span(config, 10**6)
  assert size == 15360
  assert first == expected[-1][0] + (10**6 - 15999) * 15360


def test_the_ramp_fills_up_with_empty_micro_batches(text):
  config = small(micro_batch=2, batch_start=2, batch_size=6, ramp_tokens=100.0)
  counts = []
  for step in range(12):
    batch = batches.batch_at(text.train, config, step, BOS)
    assert batch.tokens.shape == (3, 2, 8)
    counts.append(int(batch.count))
    assert not batch.tokens[batch.count :].any()
    assert (batch.targets[batch.count :] == -1).all()
    assert (batch.targets[: batch.count] >= 0).all()
  assert counts == sorted(counts) and {1, 2, 3} == set(counts)


# Batches.


@pytest.mark.parametrize('rows', [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000])
def test_each_key_permutes_all_rows(rows):
  index = np.arange(rows)
  orders = [batches.permute(index, rows, key) for key in range(8)]
  for order in orders:
    np.testing.assert_array_equal(np.sort(order), index)
  if rows > 60:  # fewer may agree by chance
    for a, b in itertools.combinations([index, *orders], 2):
      assert (a == b).mean() < 0.2
      assert (np.diff(a) == np.diff(b)).mean() < 0.2


def test_permutations_spread_evenly():
  """Where row 0 goes, and how far from it row 1, is uniform over the keys."""
  rows, keys, bins = 1001, 3000, 20
  place = np.array(
    [batches.permute(np.arange(2), rows, k) for k in range(keys)]
  )
  gap = (place[:, 1] - place[:, 0]) % rows - 1  # 0..999
  for values in (place[place[:, 0] < 1000, 0], gap):
    counts = np.bincount(values // (1000 // bins), minlength=bins)
    expected = len(values) / bins
    # The 0.9999 quantile of chi-square with 19 degrees of freedom is 50.8.
    assert ((counts - expected) ** 2 / expected).sum() < 50.8


def test_an_epoch_predicts_every_token_once_and_the_next_is_another_order(text):
  stream = text.train[: 8 * 24 + 1]
  config = small()
  steps = [batches.batch_at(stream, config, step, BOS) for step in range(8)]
  pairs = lambda some: sorted(
    (row.tolist(), target.tolist())
    for batch in some
    for row, target in zip(batch.tokens[0], batch.targets[0], strict=True)
  )
  rows = stream[:-1].reshape(24, 8).tolist()
  nexts = stream[1:].reshape(24, 8).tolist()
  expected = sorted(zip(rows, nexts, strict=True))
  assert pairs(steps[:4]) == expected == pairs(steps[4:])
  first, second = (
    np.concatenate([b.tokens for b in s]) for s in (steps[:4], steps[4:])
  )
  assert (first != second).any()


def test_a_batch_may_reach_into_the_next_epoch(text):
  stream = text.train[: 8 * 10 + 1]
  rows = [
    row.tolist()
    for step in range(5)
    for row in batches.batch_at(stream, small(), step, BOS).tokens[0]
  ]
  every = sorted(stream[:-1].reshape(10, 8).tolist())
  for epoch in range(3):
    assert sorted(rows[epoch * 10 : epoch * 10 + 10]) == every


@pytest.mark.parametrize('packing', ['joined', 'separate'])
@pytest.mark.parametrize('hosts', [2, 3, 6])
def test_row19_hosts_share_the_batch_of_one(hosts, packing, text):
  config = small(batch_size=12, micro_batch=6, packing=packing)
  for step in (0, 3, 11):
    whole = batches.batch_at(text.train, config, step, BOS)
    parts = [
      batches.batch_at(text.train, config, step, BOS, host, hosts)
      for host in range(hosts)
    ]
    for i in range(4):
      joined = np.concatenate([part[i] for part in parts], axis=1)
      np.testing.assert_array_equal(joined, whole[i])
    assert all(part.count == whole.count for part in parts)
  with pytest.raises(ConfigError, match='5 hosts'):
    batches.batch_at(text.train, config, 0, BOS, 0, 5)


def test_the_order_depends_on_the_seed_alone(text):
  steps = lambda seed: [
    batches.batch_at(text.train, small(seed=seed), step, BOS).tokens
    for step in (0, 5)
  ]
  np.testing.assert_array_equal(steps(3), steps(3))
  assert (np.array(steps(3)) != np.array(steps(4))).any()


def test_separate_documents_have_their_own_positions_and_no_shared_targets():
  document = lambda *ids: [BOS, *ids, EOS]
  stream = [7, 8, EOS, *document(1, 2), *document(3), *document(4, 5, 6), 9, 9]
  stream = np.array(stream[:13], np.uint16)
  config = small(seq_len=12, batch_size=1, packing='separate')
  batch = batches.batch_at(stream, config, 0, BOS)
  tokens, targets, segments, positions = (x[0, 0] for x in batch[:4])
  np.testing.assert_array_equal(tokens, stream[:12])
  # A target is the next token unless that begins another document.
  slow_targets, slow_segments, slow_positions = [], [], []
  segment, position = 0, 0
  for here, following in itertools.pairwise(stream.tolist()):
    if here == BOS:
      segment, position = segment + 1, 0
    slow_targets.append(-1 if following == BOS else following)
    slow_segments.append(segment)
    slow_positions.append(position)
    position += 1
  np.testing.assert_array_equal(targets, slow_targets)
  np.testing.assert_array_equal(segments, slow_segments)
  np.testing.assert_array_equal(positions, slow_positions)
  joined = dataclasses.replace(config, packing='joined')
  batch = batches.batch_at(stream, joined, 0, BOS)
  np.testing.assert_array_equal(batch.targets[0, 0], stream[1:])
  np.testing.assert_array_equal(batch.positions[0, 0], np.arange(12))
  assert not batch.segments.any()


# Evaluation.


def test_evaluation_is_the_same_every_time_and_reads_no_row_twice(text):
  config = small(micro_batch=3)
  rows = (len(text.heldout) - 1) // 8
  for count in (1, 2, 1000):
    made = batches.eval_batches(text.heldout, config, BOS, count)
    again = batches.eval_batches(text.heldout, config, BOS, count)
    assert len(made) == min(count, -(-rows // 3))
    assert all(int(batch.count) == 1 for batch in made)
    for a, b in zip(made, again, strict=True):
      np.testing.assert_array_equal(a.targets, b.targets)
    real = sum(int((batch.targets >= 0).sum()) for batch in made)
    assert real == min(rows, count * 3) * 8
  predicted = np.concatenate([b.targets[b.targets >= 0] for b in made])
  np.testing.assert_array_equal(predicted, text.heldout[1 : rows * 8 + 1])


def test_bits_per_byte_of_a_uniform_guess_is_eight_bits_and_the_specials():
  """Guessing a byte costs 8 bits; each special costs too, but has no bytes."""
  ids = np.concatenate([[BOS], BYTE.encode('héllo'), [EOS]])
  size = int(BYTE.byte_lengths()[ids[1:]].sum())
  assert size == 6
  nll = np.log(256) * (len(ids) - 1)
  np.testing.assert_allclose(batches.bits_per_byte(nll, size), 8 * 7 / 6)


# Bad input.


def fails(config, tmp_path, tokens=BYTE):
  with pytest.raises(ConfigError) as caught:
    made = corpus.prepare(config, tokens, tmp_path / 'cache', lambda line: None)
    model = ModelConfig(bos_id=0, eos_id=1)
    data_config = dataclasses.replace(config, seq_len=max(config.seq_len, 8))
    corpus.check(made, Config(model=model, data=data_config))
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_missing_empty_and_unknown_sources_are_named(tmp_path):
  empty, odd = tmp_path / 'empty.txt', tmp_path / 'odd.bin'
  empty.write_bytes(b'')
  odd.write_bytes(b'x')
  (tmp_path / 'none').mkdir()
  (tmp_path / 'blank').mkdir()
  (tmp_path / 'blank' / 'a.txt').write_bytes(b'')
  (tmp_path / 'blank' / 'b.txt').write_bytes(b'')
  for source, says in (
    ('nowhere', 'no such file'),
    ('nowhere/*.txt', 'holds no file'),
    ('empty.txt', 'is empty'),
    ('odd.bin', 'must end in'),
    ('none', 'holds no file'),
    ('blank', 'holds no text'),
  ):
    config = small(source=str(tmp_path / source))
    message = fails(config, tmp_path)
    assert says in message and source in message


def test_a_bad_row_is_named_with_its_line(tmp_path):
  path = tmp_path / 'rows.jsonl'
  good = '{"text": "fine"}\n'
  for bad in (
    '{"text": ',
    '["text"]',
    '{"txt": "a"}',
    '{"text": 3}',
    '[' * 9999,
  ):
    path.write_text(good + '\n' + bad + '\n')
    assert 'rows.jsonl:3:' in fails(small(source=str(path)), tmp_path)


def test_a_bad_parquet_is_named(tmp_path):
  pytest.importorskip('pyarrow', reason='the extra [data] is not installed')
  path = tmp_path / 'rows.parquet'
  path.write_bytes(b'PAR1 not really')
  assert 'rows.parquet' in fails(small(source=str(path)), tmp_path)
  import pyarrow
  import pyarrow.parquet

  pyarrow.parquet.write_table(pyarrow.table({'body': ['a']}), path)
  assert 'no column "text", only body' in fails(
    small(source=str(path)), tmp_path
  )


def test_a_file_that_cannot_be_opened_is_named(folder, tmp_path):
  (file, *_) = documents.files(folder)
  os.remove(file.path)
  with pytest.raises(ConfigError, match=r'00\.txt: cannot be read'):
    list(documents.read(file))


def test_invalid_utf8_is_replaced_counted_and_said_once(folder, tmp_path):
  for name in ('a.txt', 'b.txt'):
    with open(os.path.join(folder, name), 'wb') as file:
      file.write(b'genuine \xef\xbf\xbd, broken \xff and \xc3(')
  lines = []
  config, cache = small(source=folder), tmp_path / 'cache'
  made = corpus.prepare(config, BYTE, cache, lines.append)
  assert sum('4 pieces of invalid UTF-8' in line for line in lines) == 1
  every = split(made.train) + split(made.heldout)
  whole = 'genuine \ufffd, broken \ufffd and \ufffd('.encode()
  assert every.count([BOS, *whole, EOS]) == 2


def test_row21_too_little_text_and_too_small_a_vocabulary_are_said(
  folder, text
):
  tokens = len(text.train)
  model = ModelConfig(vocab=264)
  large = small(source=folder, seq_len=512, batch_size=8)
  with pytest.raises(ConfigError) as caught:
    corpus.check(text, Config(model=model, data=large))
  assert f'{tokens} training tokens' in str(caught.value)
  assert f'needs {512 * 8 + 1}' in str(caught.value)
  long = small(source=folder, seq_len=len(text.heldout), batch_size=1)
  with pytest.raises(ConfigError, match='raise data.heldout=0.2, or lower'):
    corpus.check(text, Config(model=model, data=long))
  corpus.check(text, Config(model=model, data=small(source=folder)))
  with pytest.raises(ConfigError, match='model.vocab=200.*257'):
    less = dataclasses.replace(model, vocab=200)
    corpus.check(text, Config(model=less, data=small(source=folder)))
