"""Serves a model over OpenAI's protocol, to people and evaluation harnesses.

  python -m experiments.serve --checkpoint=DIR [--port=8000]

It answers /v1/models, /v1/completions, /v1/chat/completions (streamed, too) and
/healthz. It has no keys and no encryption, so it listens on this machine only,
unless --host says otherwise, and answers no web page but those of --origin.
With --speculative the MTP module drafts, which changes only the speed; /healthz
counts the accepted drafts. For production, export the model
(`experiments.convert`) and give it to an engine made for that:
vllm serve DIR, or python -m sglang.launch_server --model-path DIR.
"""

from __future__ import annotations

import contextlib
import pathlib

from absl import flags

from mla_moe.config import ConfigError

from . import cli, opened
from .serving import template

FLAGS = flags.FLAGS


def define() -> None:
  """Defines this program's flags."""
  opened.define()
  template.define()
  flags.DEFINE_string(
    'host',
    '127.0.0.1',
    'Address to listen on. Clients must call it by this name or localhost; '
    '0.0.0.0 is all addresses, by any name.',
  )
  flags.DEFINE_multi_string(
    'origin', [], 'A web page that may use the server, as http://localhost:3000'
  )
  flags.DEFINE_string('name', '', "Of the model; '' is the folder's.")
  flags.DEFINE_integer('port', 8000, '0 is any free one.', 0, 65535)
  flags.DEFINE_integer('rows', 8, 'Samples that decode at once.', 1)
  flags.DEFINE_integer('length', 2048, 'Of prompt and answer together.', 2)
  flags.DEFINE_integer('waiting', 64, 'Prompts that may wait before 429.', 1)
  flags.DEFINE_integer('body_limit', 1 << 20, 'Bytes of a request.', 1)
  flags.DEFINE_bool('speculative', False, 'Draft with the MTP module.')


def main() -> None:
  """Serves until it is interrupted."""
  try:
    import uvicorn

    from .serving import connections, endpoint
  except ImportError:
    raise ConfigError(
      'serving needs starlette and uvicorn: pip install "mla_moe[serve]"'
    ) from None
  from .serving.engine import Engine
  from .serving.scheduler import Scheduler

  own = template.own()
  model = opened.from_flags()._replace(template=own)
  scheduler = Scheduler(
    model.config,
    model.variables,
    rows=FLAGS.rows,
    length=FLAGS.length,
    cache=model.cache,
    waiting=FLAGS.waiting,
    speculative=FLAGS.speculative,
  )
  name = FLAGS.name or pathlib.Path(FLAGS.checkpoint).resolve().name
  own = f'[{FLAGS.host}]' if ':' in FLAGS.host else FLAGS.host  # as in URLs
  hosts = ['127.0.0.1', 'localhost', '[::1]', own]
  if FLAGS.host in ('', '0.0.0.0', '::'):  # every address has names of its own
    hosts = ['*']
  app = endpoint.app(
    Engine(scheduler), model, name, FLAGS.body_limit, hosts, FLAGS.origin
  )
  server = uvicorn.Server(connections.settings(app, FLAGS.host, FLAGS.port))
  with contextlib.suppress(KeyboardInterrupt):  # after a graceful end
    server.run()


if __name__ == '__main__':
  cli.run(main, define)
