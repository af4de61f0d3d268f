"""Eight fake CPU devices and strict jax settings, before jax is imported."""

import os

_FLAG = '--xla_force_host_platform_device_count=8'
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}'.strip()

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
