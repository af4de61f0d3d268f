"""Causal attention whose keys and values differ in width, in O(T) memory.

`attend` computes softmax(scale * q k^T) v for the decompressed form of MLA,
whose queries and keys are 192 wide and values 128 (in V3); most libraries
insist on equal widths. Here are the choice between cores by platform, the
quadratic oracle, and two libraries' kernels; `flash` runs anywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mla_moe import fp8, kernels, sharding
from mla_moe.model import flash, products
from mla_moe.model.sequence import Part
from mla_moe.types import Array, Float


def attend(
  q: Float[Array, 'B T N qk'],
  k: Float[Array, 'B S N qk'],
  v: Float[Array, 'B S N U'],
  *,
  scale: float,
  segments: tuple | None = None,
  part: Part = Part(),
  impl: str = 'auto',
) -> Float[Array, 'B T N U']:
  """Returns causal attention in the dtype of v.

  Args:
    q: queries of a `part` of the sequence.
    k: keys of the whole sequence.
    v: values of the whole sequence.
    scale: the factor of the logits, `rope.softmax_scale`.
    segments: numbers of documents, int32, of the queries [B, T] and of the keys
      [B, S]. A query sees the keys of its own document; None is one document.
    part: the part of the sequence that the queries are, by default all of it.
    impl: 'reference', the quadratic oracle; 'xla', `flash`, which runs
      anywhere; 'splash', jax's TPU kernel; 'cudnn', NVIDIA's (Hopper or newer,
      bfloat16, no segments); 'auto', the fastest here (`choose_core`).

  Raises:
    ValueError: the library's kernel has no parts, or cudnn no segments.
  """
  impl = choose_core(impl, q, segments, part.count)
  if impl == 'reference':
    return _reference(q, k, v, segments, part, scale)
  if impl == 'xla':
    return flash.flash_attention(q, k, v, segments, part, scale)
  if part.count > 1:
    raise ValueError(f'{impl=} does not attend from a part of a sequence')
  kernel = {'splash': _splash, 'cudnn': _cudnn}[impl]
  return kernel(q, k, v, None if segments is None else segments[0], scale)


def choose_core(
  impl: str, q: Array, segments: tuple | Array | None, parts: int
) -> str:
  """Returns `impl`, or for 'auto' the fastest core that can do this here.

  That is splash on a TPU, cudnn on a GPU that has it, and xla elsewhere and
  where a sequence is split into `parts`.
  """
  if impl != 'auto':
    return impl
  platform = sharding.target_platform()
  if parts > 1:
    return 'xla'
  if platform == 'tpu' and q.shape[1] % 128 == 0:
    return 'splash'
  if platform == 'gpu' and segments is None and q.dtype == jnp.bfloat16:
    if kernels.cuda_capability(jax.devices()[0]) >= 9.0:
      return 'cudnn'
  return 'xla'


@jax.named_scope('expand')
def expand(latent, k_rope, ws, recipe, name=fp8.SAVED):
  """Returns keys [B, S, N, H + R] and values [B, S, N, U] of the latents."""
  equations = 'btc,cnh->btnh', 'btc,cnu->btnu'
  k_nope, v = products.einsums(equations, latent, ws, recipe, name)
  shape = (*k_nope.shape[:3], k_rope.shape[-1])
  shared = jnp.broadcast_to(k_rope[:, :, None], shape)
  return jnp.concatenate([k_nope, shared], axis=-1), v


def _reference(q, k, v, segments, part, scale):
  logits = products.dot('btnh,bsnh->bnts', q, k) * scale
  positions, keys = part.positions(q.shape[1])[None], jnp.arange(k.shape[1])
  seen = flash.seen(positions, keys, *(segments or ()))[:, None]
  probs = jax.nn.softmax(jnp.where(seen, logits, kernels.MASKED), axis=-1)
  out = products.dot('bnts,bsnu->btnu', probs.astype(v.dtype), v)
  return checkpoint_name(out.astype(v.dtype), flash.OUT)


def _splash(q, k, v, segments, scale):
  """Returns the output of jax's TPU kernel, called once a row of the batch."""
  from jax.experimental.pallas.ops.tpu import splash_attention

  kernel = splash_attention.splash_attention_kernel
  masks = splash_attention.splash_attention_mask
  t, heads = q.shape[1:3]
  names = ('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv')
  names += ('block_kv_dkv', 'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq')
  block = next(size for size in (512, 256, 128, t) if t % size == 0)
  sizes = kernel.BlockSizes(**dict.fromkeys(names, block))
  mask = masks.MultiHeadMask([masks.CausalMask((t, t))] * heads)
  run = kernel.make_splash_mha_single_device(
    mask=mask,
    block_sizes=sizes,
    residual_checkpoint_name=flash.OUT,
    interpret=sharding.target_platform() == 'cpu',
  )
  heads_first = lambda x: x.swapaxes(1, 2)
  args = heads_first(q * scale), heads_first(k), heads_first(v)
  if segments is None:
    out = jax.vmap(run)(*args)
  else:
    ids = kernel.SegmentIds(q=segments, kv=segments)
    out = jax.vmap(lambda q, k, v, s: run(q, k, v, segment_ids=s))(*args, ids)
  return heads_first(out).astype(v.dtype)


def _cudnn(q, k, v, segments, scale):
  """Returns the output of NVIDIA's fused kernel (cuDNN 9.13, Hopper or newer).

  jax.nn's public wrapper refuses a v that is narrower than k; the function
  under it does not.
  """
  from jax._src.cudnn import fused_attention_stablehlo as fused

  if segments is not None:
    raise ValueError("impl='cudnn' sees every token of a row; use impl='xla'")
  causal = fused.MaskType.CAUSAL
  out = fused.dot_product_attention(
    q, k, v, scale=scale, mask_type=causal, qkv_layout='BTNH'
  )
  return checkpoint_name(out, flash.OUT)
