"""Really compiled for H100s that are not here, kernels down to machine code.

XLA's CUDA plugin needs no GPU for that: `pip install jax-cuda13-plugin
nvidia-cuda-nvcc`; the second has ptxas. Each program runs in a process of its
own, for the plugin is read from the environment.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from products import PRODUCTS

# The wheel's programs are not on the path by themselves.
NVCC = os.path.join(sysconfig.get_path('purelib'), 'nvidia', 'cu13', 'bin')
PATH = os.pathsep.join([os.environ['PATH'], NVCC])
HERE = importlib.util.find_spec('jax_cuda13_plugin') and shutil.which(
  'ptxas', path=PATH
)
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not HERE, reason='compiling for a GPU needs the extra [cuda] and ptxas'
  ),
]

START = """
import functools, re
import jax
import jax.numpy as jnp
from experiments import chips
from experiments.plan import compiled

devices = compiled.describe(chips.parse('h100:8')).devices
auto = jax.sharding.AxisType.Auto
one = jax.make_mesh((1,), ('x',), (auto,), devices=devices[:1])
where = jax.sharding.NamedSharding(one, jax.sharding.PartitionSpec())
shape = lambda s, d: jax.ShapeDtypeStruct(s, d, sharding=where)
calls = lambda program, name: len(re.findall(name, program.as_text()))
"""

MGPU = """
impl, target = 'mgpu', 'mosaic_gpu'
"""

LATENT = """
from mla_moe.kernels import latent_gpu

# Pages of 64 tokens; and of one: the slots of a set (`sparse_attention`).
for heads, tokens, dtype, page, count in (
  (128, 1, jnp.bfloat16, 64, 64),
  (128, 2, jnp.bfloat16, 64, 64),
  (16, 1, jnp.bfloat16, 64, 64),
  (128, 1, jnp.float32, 64, 64),
  (128, 1, jnp.bfloat16, 1, 2048),
):
  run = functools.partial(latent_gpu.attend, heads=heads, rank=512)
  args = (
    shape((8, heads * tokens, 576), dtype),
    shape((4096 * 64 // page, page, 576), dtype),
    shape((8, count), jnp.int32),
    shape((8,), jnp.int32),
  )
  with jax.set_mesh(one):  # jax 0.12 asks for a device's name
    program = jax.jit(run).lower(*args).compile()
  assert calls(program, 'custom_call_target="__gpu.xla.gpu.triton"')
  # Nothing of the pool is copied on its way into the kernel.
  pool = 4096 * 64 * 576 * jnp.dtype(dtype).itemsize
  assert program.memory_analysis().temp_size_in_bytes < pool / 8
"""

STEP = """
from configs import small
from experiments.plan import traffic
from mla_moe import config as c
from experiments.plan import hlo

config = small.get_config()
config.mesh.update(fsdp=2, expert=4)
config.model.update(layers=3, precision='fp8_block')
config.data.update(seq_len=256)
config = c.freeze(config)
lowered, mesh = compiled.lower(config, devices)
program = lowered.compile()
assert calls(program, 'custom_call_target="mosaic_gpu')
args = program.as_text(), mesh.axis_names, mesh.devices.shape, 4
moved = dict.fromkeys(mesh.axis_names, 0.0)
for row in hlo.collectives(*args):
  moved[row['axis'].split('+')[0]] += row['bytes']
for axis, size in traffic.by_axis(config).items():
  if size:
    assert 0.7 < moved[axis] / size < 1.5, (axis, moved[axis] / size)
"""


def compile_all(program, **more):
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',
    'PATH': PATH,
    **more,
  }
  command = [sys.executable, '-c', START + program]
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert not done.returncode, done.stderr[-2000:]


def test_fp8_products_compile_and_spill_nothing(tmp_path):
  dump = {'MOSAIC_GPU_DUMP_TO': str(tmp_path), 'MOSAIC_GPU_DUMP_PTXAS': '1'}
  compile_all(MGPU + PRODUCTS, **dump)
  logs = [path.read_text() for path in tmp_path.glob('*.ptxas')]
  assert len(logs) == 6
  for text in logs:
    assert "'sm_90a'" in text
    spilled = re.findall(r'(\d+) bytes (stack frame|spill \w+)', text)
    assert len(spilled) == 3 and {n for n, _ in spilled} == {'0'}, text


def test_absorbed_decoding_compiles_and_copies_no_pool():
  compile_all(LATENT)


@pytest.mark.by_hand
@pytest.mark.timeout(900)
def test_a_training_step_compiles_with_the_kernels_in_it():
  compile_all(STEP)
