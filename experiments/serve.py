"""An OpenAI-compatible endpoint, for people and evaluation harnesses.

  python -m experiments.serve --checkpoint=DIR [--port=8000]

It answers /v1/models, /v1/completions, /v1/chat/completions (streamed, too) and
/healthz, and only on this machine unless --host says otherwise: it has no keys
and no encryption. With --speculative the MTP module drafts, which changes only
the speed; /healthz counts the drafts that stood. For production, export the
model (`experiments.convert`) and serve it with an engine made for that: vllm
serve DIR, or python -m sglang.launch_server --model-path DIR.
"""

from __future__ import annotations

import pathlib

from absl import flags

from experiments import cli, generate
from mla_moe.config import ConfigError

FLAGS = flags.FLAGS


def define() -> None:
  """This program's flags."""
  generate.define_model()
  flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on.')
  flags.DEFINE_integer('port', 8000, '0 is any free one.', 0, 65535)
  flags.DEFINE_integer('rows', 8, 'Samples that decode at once.', 1)
  flags.DEFINE_integer('length', 2048, 'Of prompt and answer together.', 2)
  flags.DEFINE_integer('waiting', 64, 'Requests that may wait.', 1)
  flags.DEFINE_integer('body_limit', 1 << 20, 'Bytes of a request.', 1)
  flags.DEFINE_bool('speculative', False, 'Draft with the MTP module.')


def main() -> None:
  """Serves until it is interrupted."""
  try:
    import uvicorn

    from experiments.serving import endpoint
  except ImportError:
    raise ConfigError(
      'serving needs starlette and uvicorn: pip install "mla_moe[serve]"'
    ) from None
  from experiments.serving import scheduler
  from experiments.serving.engine import Engine
  from mla_moe import CacheConfig

  loaded = generate.open_checkpoint()
  work = scheduler.Scheduler(
    loaded.config,
    loaded.variables,
    rows=FLAGS.rows,
    length=FLAGS.length,
    cache=CacheConfig(dtype=FLAGS.cache),
    waiting=FLAGS.waiting,
    speculative=FLAGS.speculative,
  )
  name = pathlib.Path(FLAGS.checkpoint).expanduser().resolve().name
  app = endpoint.app(Engine(work), loaded, name, FLAGS.body_limit)
  uvicorn.run(app, host=FLAGS.host, port=FLAGS.port, log_level='info')


if __name__ == '__main__':
  cli.run(main, define)
