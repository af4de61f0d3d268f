"""Loading each format of weights: time for a number, and memory beyond them.

  python -m experiments.bench formats
  python -m experiments.bench formats --experts=384 --width=256 --only=int4
  python -m experiments.bench formats --thinking --only=int4 --base=int4

Writes one synthetic layer of experts with Kimi-K2-Thinking's other sizes (7168
wide, int4 in groups of 32, names included) in each format, warms the page
cache, and loads it as bfloat16 in a process of its own. Loading counts the
parameters, so that formats of other sizes compare, and the seconds of its
threads on a CPU, which other programs on the machine hardly change. --base
loads what adapters are trained over: codes, in the bytes of their file where
they fit. --thinking has the release's own config.json, but for two layers of
61: 14.4 GiB on the disk, and 13.6 in memory.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import time

import ml_dtypes
import numpy as np

from mla_moe import config as c
from mla_moe.hf import config_json, names, safetensors

from .. import cli, commands, runtime
from ..adapters import codes
from . import show

_BF16, _F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
_E4M3, _U8 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.uint8)


def _group(bits: int, size: int, kind: str = 'int') -> dict:
  weights = {'num_bits': bits, 'type': kind, 'symmetric': True}
  weights |= {'group_size': size} if size else {}
  return {'config_groups': {'group_0': {'weights': weights}}}


def _packed(rows, columns, bits, group):
  return {
    '_packed': (np.dtype(np.int32), (rows, columns * bits // 32)),
    '_scale': (_BF16, (rows, columns // group)),
    '_shape': (np.dtype(np.int32), (2,)),
  }


# name: the parts of a weight [rows, columns], and the config's description.
FORMATS = {
  'bf16': (lambda r, c: {'': (_BF16, (r, c))}, None),
  'fp8': (
    lambda r, c: {
      '': (_E4M3, (r, c)),
      '_scale_inv': (_F32, (r // 128, c // 128)),
    },
    {'quant_method': 'fp8', 'weight_block_size': [128, 128]},
  ),
  'int8': (
    lambda r, c: {'': (np.dtype(np.int8), (r, c)), '_scale': (_BF16, (r, 1))},
    _group(8, 0) | {'format': 'int-quantized'},
  ),
  'int4': (
    lambda r, c: _packed(r, c, 4, 32),
    _group(4, 32) | {'format': 'pack-quantized'},
  ),
  'mxfp4': (
    lambda r, c: {
      '_packed': (_U8, (r, c // 2)),
      '_scale': (_U8, (r, c // 32)),
    },
    _group(4, 32, 'float') | {'format': 'mxfp4-pack-quantized'},
  ),
  'nvfp4': (
    lambda r, c: {
      '_packed': (_U8, (r, c // 2)),
      '_scale': (_E4M3, (r, c // 16)),
      '_global_scale': (_F32, (1,)),
    },
    _group(4, 16, 'float') | {'format': 'nvfp4-pack-quantized'},
  ),
}

# Kimi-K2-Thinking's config.json without the keys that say how it is served.
THINKING = {
  'architectures': ['DeepseekV3ForCausalLM'],
  'model_type': 'kimi_k2',
  'attention_bias': False,
  'bos_token_id': 163584,
  'eos_token_id': 163586,
  'first_k_dense_replace': 1,
  'hidden_act': 'silu',
  'hidden_size': 7168,
  'intermediate_size': 18432,
  'kv_lora_rank': 512,
  'max_position_embeddings': 262144,
  'moe_intermediate_size': 2048,
  'moe_layer_freq': 1,
  'n_group': 1,
  'n_routed_experts': 384,
  'n_shared_experts': 1,
  'norm_topk_prob': True,
  'num_attention_heads': 64,
  'num_experts_per_tok': 8,
  'num_hidden_layers': 2,  # of 61
  'num_key_value_heads': 64,
  'num_nextn_predict_layers': 0,
  'q_lora_rank': 1536,
  'qk_nope_head_dim': 128,
  'qk_rope_head_dim': 64,
  'rms_norm_eps': 1e-5,
  'rope_scaling': {
    'beta_fast': 1.0,
    'beta_slow': 1.0,
    'factor': 64.0,
    'mscale': 1.0,
    'mscale_all_dim': 1.0,
    'original_max_position_embeddings': 4096,
    'type': 'yarn',
  },
  'rope_theta': 50000.0,
  'routed_scaling_factor': 2.827,
  'scoring_func': 'sigmoid',
  'tie_word_embeddings': False,
  'topk_group': 1,
  'topk_method': 'noaux_tc',
  'torch_dtype': 'bfloat16',
  'v_head_dim': 128,
  'vocab_size': 163840,
}


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  add = parser.add_argument
  add('--folder', default='', help='scratch; else below --out')
  add('--experts', type=int, default=24)
  add('--width', type=int, default=2048, help='of an expert')
  add('--repeats', type=int, default=3, help='of which the best counts')
  add('--only', default='', help='some formats, by commas')
  add('--thinking', action='store_true', help="the release's config.json")
  bases = ('trained', *codes.GROUPS)
  add('--base', default='trained', choices=bases, help='kept as codes, or not')
  add('--load', action='store_true', help='load the folder, once')


def run(out: pathlib.Path, args) -> None:
  """Prints the table, as Markdown."""
  folder = cli.path('--folder', args.folder or out / 'formats')
  if args.load:
    print(json.dumps(load(folder, args.base)))
    return
  rows, chosen = {}, show.chosen(args.only, FORMATS)
  config = model(args.experts, args.width)
  values = THINKING if args.thinking else config_json.write(config, 'bfloat16')
  print(
    f'| format | GiB of files | G parameters/s | CPU ns '
    f'| of {chosen[0]} | result, GiB | beyond, MiB |'
  )
  print('|---|---|---|---|---|---|---|')
  for name in chosen:
    size = write(folder / name, values, name)
    words = (f'--folder={folder / name}', f'--base={args.base}', '--load')
    command = [*commands.program('bench'), 'formats', *words]
    runs = []
    for _ in range(args.repeats):
      done = subprocess.run(command, check=True, capture_output=True, text=True)
      runs.append(json.loads(done.stdout.splitlines()[-1]))
    shutil.rmtree(folder / name)
    rows[name] = min(x['cpu'] / x['parameters'] * 1e9 for x in runs)
    speed = max(x['parameters'] / x['seconds'] / 1e9 for x in runs)
    beyond = max(x['beyond'] for x in runs) / 2**20
    print(
      f'| {name} | {size / 2**30:.2f} | {speed:.2f} | {rows[name]:.2f} | '
      f'{rows[chosen[0]] / rows[name]:.2f} | '
      f'{runs[0]["bytes"] / 2**30:.2f} | {beyond:.0f} |',
      flush=True,
    )


def model(experts: int, width: int) -> c.ModelConfig:
  """Returns Kimi K2's sizes in one layer, nine tenths of it experts."""
  moe = c.MoEConfig(
    experts=experts,
    top_k=min(8, experts),
    width=width,
    groups=1,
    top_groups=1,
    scale=2.827,
  )
  return c.ModelConfig(
    vocab=1024,
    layers=1,
    dense_layers=0,
    bos_id=0,
    eos_id=1,
    mla=c.MLAConfig(heads=64, rope=c.RopeConfig(theta=50000.0)),
    moe=moe,
    mtp=c.MTPConfig(depth=0),
  )


def write(folder: pathlib.Path, values: dict, name: str) -> int:
  """Writes the folder; returns its bytes. Only experts are quantised.

  `values` are config.json's.
  """
  parts, quantization = FORMATS[name]
  config = config_json.read(values, 'bfloat16')
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  plan = {}
  for row in names.rows(config):
    for index in row.indices():
      tensor, shape = row.tensor(index), row.file_shape
      if '.mlp.experts.' in tensor:
        plan |= {tensor + k: x for k, x in parts(*shape).items()}
      else:
        plan[tensor] = _F32 if row.path[0] == 'router' else _BF16, shape
  pool = np.random.default_rng(0).integers(0, 255, 2**22, np.uint8)
  path = folder / 'model.safetensors'
  with safetensors.create(path, plan) as arrays:
    for tensor, array in arrays.items():
      if tensor.endswith('_shape'):
        codes = arrays[tensor.replace('_shape', '_packed')]
        array[:] = codes.shape[0], codes.shape[1] * 8
      elif '_packed' in tensor or array.dtype == np.int8:
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, pool.size):
          flat[start : start + pool.size] = pool[: flat.size - start]
      elif array.dtype == np.uint8:
        array[...] = 120
      else:
        array[...] = np.float32(0.02).astype(array.dtype)
      del array
  if quantization:
    method = quantization.get('quant_method', 'compressed-tensors')
    quantization = quantization | {'quant_method': method}
    values = values | {'quantization_config': quantization}
  (folder / 'config.json').write_text(json.dumps(values), encoding='utf-8')
  return path.stat().st_size


def load(folder: pathlib.Path, base: str) -> dict:
  """Returns seconds, parameters, bytes of the result and those beyond."""
  import jax
  import jax.numpy as jnp

  from mla_moe import cost

  from ..adapters.load import load_base

  jnp.zeros(8).block_until_ready()
  with open(folder / 'model.safetensors', 'rb', buffering=0) as file:
    buffer = bytearray(2**24)
    while file.readinto(buffer):  # into the page cache
      pass
  before = runtime.peak_memory()
  began, worked = time.perf_counter(), time.process_time()
  config, variables = load_base(folder, base, 'bfloat16')
  seconds = time.perf_counter() - began
  worked = time.process_time() - worked
  size = sum(x.nbytes for x in jax.tree.leaves(variables))
  return {
    'seconds': seconds,
    'cpu': worked,
    'parameters': cost.parameters(config).total,
    'bytes': size,
    'beyond': runtime.peak_memory() - before - size,
  }
