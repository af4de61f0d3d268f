"""Collectives counted in a compiled program are those that were written."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.plan import hlo
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
  """As libtpu writes them: unsigned counters, and a thread behind a brace."""
  text = WINDOWED.replace('STEP', str(step))
  (row,) = hlo.collectives(text, AXES, SIZES, unknown=100)
  assert row['kind'] == 'collective-permute'
  assert row['count'] == count and row['bytes'] == count * 64 * 4
