"""Collectives counted in a compiled program are those that were written."""

import functools
import os
import shlex
import subprocess
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments import chips
from experiments.plan import copies, hlo, overlap, scheduled
from mla_moe.config import ConfigError
from mla_moe.model import exchange

AXES, SIZES = ('data', 'fsdp'), (2, 4)


def compiled(f, spec, shape):
  mesh = jax.make_mesh(SIZES, AXES, axis_types=(AxisType.Auto,) * 2)
  run = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
  x = jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh, spec)
  )
  return jax.jit(run).lower(x).compile().as_text()


def test_kinds_axes_loops_and_bytes():
  def body(x, _):
    x = x + jax.lax.psum(x, 'data')
    whole = jax.lax.all_gather(x, 'fsdp', tiled=True)
    return jax.lax.psum_scatter(whole, 'fsdp', tiled=True) * x, None

  def f(x):  # [64] on each device
    x = jax.lax.scan(body, x, length=5)[0]
    return jax.lax.ppermute(x, 'data', [(0, 1), (1, 0)])

  text = compiled(f, PartitionSpec(AXES), (512,))
  rows = hlo.collectives(text, AXES, SIZES)
  by_kind = {
    (row['axis'], row['kind']): (row['count'], row['bytes']) for row in rows
  }
  part = 64 * 4
  assert by_kind['data', 'all-reduce'] == (5, 5 * part)  # 2 * (2 - 1) / 2
  assert by_kind['fsdp', 'all-gather'] == (5, 5 * 3 * part)
  assert by_kind['fsdp', 'reduce-scatter'] == (5, 5 * 3 * part)
  assert by_kind['data', 'collective-permute'] == (1, part)


def test_a_loop_of_unknown_length_turns_as_often_as_one_says():
  def f(x):
    add = lambda _, x: jax.lax.psum(x, AXES)[:64]
    return jax.lax.fori_loop(0, x[0].astype(jnp.int32), add, x)

  f = functools.partial(f)
  mesh_text = compiled_everywhere(f)
  (row,) = hlo.collectives(mesh_text, AXES, SIZES, unknown=7)
  assert row['axis'] == 'data+fsdp' and row['count'] == 7
  assert row['bytes'] == 7 * 2 * 64 * 4 * 7 / 8


def compiled_everywhere(f):
  mesh = jax.make_mesh(SIZES, AXES, axis_types=(AxisType.Auto,) * 2)
  run = jax.shard_map(
    f,
    mesh=mesh,
    in_specs=PartitionSpec(),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  return jax.jit(run).lower(jnp.ones(64)).compile().as_text()


def test_groups_in_both_notations():
  line = 'all-reduce(x), replica_groups=[4,2]<=[2,4]T(1,0), use'
  assert hlo._group(line, 8) == [0, 4]
  line = 'all-reduce(x), replica_groups={{0,1,2,3},{4,5,6,7}}, use'
  assert hlo._axis(hlo._group(line, 8), AXES, SIZES) == 'fsdp'


def test_further_rounds_count_for_nothing():
  """They turn as often as the load is unbalanced; the rest of a step does."""

  def f(x):
    more = lambda _, x: jax.lax.psum(x, 'fsdp')[:64]
    with jax.named_scope(exchange.FURTHER):
      y = jax.lax.fori_loop(0, x[0].astype(jnp.int32), more, x)
    return jax.lax.psum(y, 'data')

  (row,) = hlo.collectives(compiled_everywhere(f), AXES, SIZES, unknown=7)
  assert row['axis'] == 'data' and row['count'] == 1


def test_what_is_started_is_counted_by_its_results():
  """As XLA writes it for GPUs (operands nested), TPUs, and in one piece."""
  wide, part = 'bf16[8,64]{1,0}', 'bf16[2,64]{1,0}'
  size = 2 * 2 * 64
  for kind, shape, received in (
    ('reduce-scatter', f'(({wide}), {part})', 3 * size),
    ('all-gather', f'({part}, {wide})', 3 * size),
    ('all-gather', f'(({part}, {part}), ({wide}, {wide}))', 6 * size),
    ('all-to-all', f'((s32[8]{{0}}, {part}), {part})', 3 / 4 * size),
    ('all-reduce', part, 3 / 2 * size),
    ('collective-permute', f'({part}, {part}, u32[], u32[])', size),
  ):
    assert hlo._received(kind, shape, True, 4, False) == received, kind
  assert hlo._received('all-to-all', part, False, 4, False) == 3 / 4 * size


WINDOWED = """
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b)
}, execution_thread="sparsecore"

%cond (p: (u32[], f32[64])) -> pred[] {
  %i.1 = u32[] get-tuple-element(%p), index=0
  %end = u32[]{:T(128)} constant(8)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

%body (p: (u32[], f32[64])) -> (u32[], f32[64]) {
  %i.2 = u32[] get-tuple-element(%p), index=0
  %step = u32[]{:T(128)} constant(STEP)
  %count = u32[] get-tuple-element(%p), index=2
  %two = u32[] constant(2)
  %other = u32[] add(%count, %two)
  %next = u32[] add(%i.2, %step)
  %x = f32[64]{0} get-tuple-element(%p), index=1
  %y = f32[64]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %t = (u32[], f32[64]) tuple(%next, %y)
}

ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %zero = u32[] constant(0)
  %start = (u32[], f32[64]) tuple(%zero, %x)
  %loop = (u32[], f32[64]) while(%start), condition=%cond, body=%body
  ROOT %out = f32[64]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize('step, count', [(1, 8), (2, 4)])
def test_windowed_loops_after_a_sparse_core(step, count):
  """As libtpu writes them: unsigned counters, and a thread behind a brace.

  Another number that grows by two is no counter.
  """
  text = WINDOWED.replace('STEP', str(step))
  (row,) = hlo.collectives(text, AXES, SIZES, unknown=100)
  assert row['kind'] == 'collective-permute'
  assert row['count'] == count and row['bytes'] == count * 64 * 4


SCHEDULED = """
%product (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %c = bf16[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf
}

%chain_start (a: bf16[8,8]) -> bf16[32,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %g = bf16[32,8]{1,0} all-gather(%a), channel_id=5, CHAIN
}

%chain_middle (a: bf16[8,8]) -> (bf16[8,8], bf16[32,8]) {
  %a = bf16[8,8]{1,0} parameter(0)
  %g = bf16[32,8]{1,0} all-gather(%a), channel_id=5, CHAIN
  %c = bf16[8,8]{1,0} fusion(%a), kind=kOutput, calls=%product
  ROOT %t = (bf16[8,8], bf16[32,8]) tuple(%c, %g)
}

%moved (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %r = bf16[8,8]{1,0} ragged-all-to-all(%a), channel_id=7
}, execution_thread="sparsecore"

%summed.all-reduce-scatter (a: bf16[8,8]) -> bf16[2,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %s = bf16[8,8]{1,0} all-reduce(%a), channel_id=9
  ROOT %p = bf16[2,8]{1,0} dynamic-slice(%s)
}

%cond (p: (s32[], bf16[8,8])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %end = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%body (p: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %p = (s32[], bf16[8,8]{1,0}) parameter(0)
  %x = bf16[8,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %early = (bf16[8,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%x), channel_id=1
  %work = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%product
  %late = (bf16[8,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%x), channel_id=2
  %one = bf16[32,8]{1,0} all-gather-done(%early)
  %two = bf16[32,8]{1,0} all-gather-done(%late)
  %three = bf16[32,8]{1,0} all-gather(%x), channel_id=3
  %copy = (bf16[8,8]{1,0}, bf16[8,8]{1,0}) copy-start(%x)
  %copied = bf16[8,8]{1,0} copy-done(%copy)
  ROOT %t = (s32[], bf16[8,8]{1,0}) tuple(%i, %copied)
}

%more (p: pred[]) -> pred[] {
  ROOT %p = pred[] parameter(0)
}

%blocks (x: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %mid = (bf16[8,8], bf16[32,8]) fusion(%x), kind=kCustom, calls=%chain_middle
  ROOT %y = bf16[8,8]{1,0} get-tuple-element(%mid), index=0
}

ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %loop = (s32[], bf16[8,8]) while(%x), condition=%cond, body=%body
  %begin = bf16[32,8]{1,0} fusion(%x), kind=kCustom, calls=%chain_start
  %mid = bf16[8,8]{1,0} while(%x), condition=%more, body=%blocks
  %sent = ((bf16[8,8]), bf16[8,8]) async-start(%x), calls=%moved
  %kernel = bf16[8,8] custom-call(%x), custom_call_target="tpu_custom_call"
  %given = ((bf16[8,8]), bf16[8,8]) async-update(%sent, %x)
  KERNEL
  %back = bf16[8,8]{1,0} async-done(%given)
  ROOT %sum = bf16[2,8] fusion(%x), calls=%summed.all-reduce-scatter
}
""".replace('CHAIN', 'frontend_attributes={chain_id="23"}')


def test_a_transfer_is_beside_the_products_between_its_start_and_its_end():
  """As libtpu writes it: a pair of lines, a chain of fusions, a sparse core.

  A sparse core's transfer begins at its update; work before it is not beside.
  A chain is one transfer, though it goes on in a loop of many turns.
  """
  kernel = '%late = bf16[8] custom-call(), custom_call_target="tpu_custom_call"'
  for work, state in ((kernel, 'beside'), ('', 'idle')):
    text = SCHEDULED.replace('KERNEL', work)
    rows = {row.pop('kind'): row for row in overlap.overlap(text, unknown=7)}
    counted = hlo.collectives(text, AXES, SIZES, unknown=7)
    for kind, row in rows.items():
      same = [one['count'] for one in counted if one['kind'] == kind]
      assert same == [sum(row.values())], kind
    assert rows.pop('all-gather') == {'beside': 3 + 1, 'idle': 3, 'sync': 3}
    assert rows.pop('reduce-scatter') == {'beside': 0, 'idle': 0, 'sync': 1}
    ragged = rows.pop('ragged-all-to-all')
    assert not rows and ragged[state] == sum(ragged.values()) == 1


TUPLED = """
%product (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %c = bf16[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf
}

%moved (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %r = bf16[8,8]{1,0} ragged-all-to-all(%a), channel_id=7
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %early = (bf16[8,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%x), channel_id=1
  %pair = (bf16[8,8]{1,0}, (bf16[8,8]{1,0}, bf16[32,8]{1,0})) tuple(%x, %early)
  %work = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%product
  %out = (bf16[8,8]{1,0}, bf16[32,8]{1,0}) get-tuple-element(%pair), index=1
  %one = bf16[32,8]{1,0} all-gather-done(%out)
  %alone = bf16[8,8]{1,0} all-reduce(%x), replica_groups={{0},{1}}
  %late = bf16[8,8]{1,0} all-reduce-start(%x), channel_id=3
  %sent = ((bf16[8,8]), bf16[8,8]) async-start(%x), calls=%moved
  %given = ((bf16[8,8]), bf16[8,8]) async-update(%sent), calls=%moved
  ROOT %back = bf16[8,8]{1,0} async-done(%given), calls=%moved
}
"""


def test_each_transfer_counts_once():
  """Ended through a tuple, or not here; of one device; called on each line."""
  rows = {row.pop('kind'): row for row in overlap.overlap(TUPLED)}
  assert rows.pop('all-gather') == {'beside': 1, 'idle': 0, 'sync': 0}
  assert rows.pop('all-reduce') == {'beside': 0, 'idle': 1, 'sync': 0}
  assert rows.pop('ragged-all-to-all') == {'beside': 0, 'idle': 1, 'sync': 0}
  assert not rows
  counted = hlo.collectives(TUPLED, AXES, SIZES)
  assert [row['count'] for row in counted] == [1, 1, 1]


def test_transfers_beside_work_and_others_are_all_transfers():
  def f(x):
    add = lambda x, _: (x + jax.lax.psum(x @ x, 'data'), None)
    x = jax.lax.scan(add, x, length=5)[0]
    return jax.lax.psum_scatter(x, 'fsdp', tiled=True)

  text = compiled(f, PartitionSpec(AXES), (64, 8))
  counts = {row['kind']: 0 for row in hlo.collectives(text, AXES, SIZES)}
  for row in hlo.collectives(text, AXES, SIZES):
    counts[row['kind']] += row['count']
  assert counts == {
    row['kind']: sum(row[state] for state in overlap.STATES)
    for row in overlap.overlap(text)
  }
  assert sum(counts.values()) == 6


def test_a_schedule_has_its_memory_in_libtpu_s_files():
  report = 'Memory Space: default (color=0)\nTotal bytes: 300 (300B)\n'
  report += 'Memory Space: vmem (color=1)\nTotal bytes: 64 (64B)\n'
  assert scheduled.needed(report) == 300
  buffers = """BufferAssignment:
allocation 0: size 8, page 0, thread-local:
allocation 1: size 100, page 0, parameter 23, shape |f32[26]| at ShapeIndex {}:
 value: <15790 param.272 @0> (size=100,offset=0): f32[26], parameter 9,
allocation 2: size 50, color 0, page 0, parameter 2, shape |f32[1]|, output:
allocation 3: size 70, color 1, page 0, parameter 3, shape |f32[1]|:
allocation 4: size 40, page 0, preallocated-temp:
"""
  assert scheduled.arguments(buffers) == 150


def test_a_dump_may_lie_in_a_folder_with_a_space(tmp_path, monkeypatch):
  """XLA cuts its flags at spaces, but for those in quotes."""
  own = tmp_path / 'a b'
  own.mkdir()
  monkeypatch.setattr(scheduled.tempfile, 'tempdir', str(own))
  described = lambda *_: ('{}', {'XLA_FLAGS': '--xla_mine=1'})
  monkeypatch.setattr(scheduled.compiled, 'job', described)
  flags = []

  def start(*_, env, **__):
    flags.append(env['XLA_FLAGS'])
    return subprocess.Popen(['true'])

  fake = types.SimpleNamespace(Popen=start)
  monkeypatch.setattr(scheduled, 'subprocess', fake)
  with pytest.raises(ConfigError, match='--schedule: libtpu failed'):
    scheduled.step(None, chips.parse('v5e:2x2'))
  words = shlex.split(flags[0])
  assert words[0] == '--xla_mine=1' and len(words) == 4
  assert words[1].startswith(f'--xla_dump_to={own}/')


def test_a_schedule_is_whole_once_the_file_after_it_lies_there(tmp_path):
  """libtpu writes one of that name at the beginning, too."""
  name = 'module_0000.jit_train_step.cl_1'
  program = tmp_path / f'{name}.after_optimizations.txt'
  last = tmp_path / f'{name}.debug_options'
  (tmp_path / f'{name}.after_optimizations_before_x.txt').touch()
  last.touch()
  assert not scheduled._is_whole(tmp_path)
  program.touch()
  for seconds, whole in ((5, False), (10, True), (15, True)):
    os.utime(program, (10, 10))
    os.utime(last, (seconds, seconds))
    assert scheduled._is_whole(tmp_path) == whole


COPIED = """
%cast (p: f32[512,1024]) -> bf16[512,1024] {
  %p = f32[512,1024]{1,0} parameter(0)
  ROOT %c = bf16[512,1024]{1,0} convert(%p)
}

%double (p: f32[512,1024]) -> f32[512,1024] {
  %p = f32[512,1024]{1,0} parameter(0)
  %c = f32[512,1024]{0,1} copy(%p)
  ROOT %s = f32[512,1024]{0,1} add(%c, %c)
}

%body (t: (f32[512,1024])) -> (f32[512,1024]) {
  %x = f32[512,1024]{1,0} get-tuple-element(%t), index=0
  %few = f32[8,1024]{0,1} copy(%y)
  %turned = f32[512,1024]{0,1} copy(%x)
  %two = f32[512,1024]{0,1} fusion(%turned), kind=kLoop, calls=%double
  ROOT %out = (f32[512,1024]) tuple(%two)
}

ENTRY %main (x: f32[512,1024]) -> bf16[512,1024] {
  %l = (f32[512,1024]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %y = f32[512,1024]{1,0} get-tuple-element(%l), index=0
  ROOT %n = bf16[512,1024]{1,0} fusion(%y), kind=kLoop, calls=%cast
}
"""  # noqa: E501


def test_copies_and_casts_of_whole_arrays_are_counted():
  """Five turns of one copy and a cast; not what a sum reads, nor 32 KiB."""
  assert copies.size(COPIED) == 5 * 2**21 + 2**20
