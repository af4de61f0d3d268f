"""Compares formulas by math-verify in a process of its own: child of `grading`.

math-verify sets an alarm signal, so that it fails in a thread, and sympy may
compute 9^{9^{9^9}} for ever. The parent kills this process at its deadline and
starts another; the kernel's limits end it where the parent has gone. So this
file runs as a program, and imports nothing of the package. It reads a request
a line, {"gold", "answer", "seconds"}, and writes {"right"} or {"error"}.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time

MEMORY = 2**31  # bytes


def _limit(seconds: float) -> None:
  """Ends this process after so many more seconds of a processor."""
  import resource  # Windows has none: `cli` says so

  end = math.ceil(time.process_time() + seconds) + 1
  with contextlib.suppress(ValueError, OSError):  # macOS has not all of them
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (end, hard))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def main() -> None:
  """Writes a line when it is ready, and then one for each request."""
  import math_verify

  logging.disable()
  config = [math_verify.LatexExtractionConfig()]

  def parsed(text: str) -> list:
    return math_verify.parse(
      f'${text}$',
      extraction_config=config,
      fallback_mode='no_fallback',
      parsing_timeout=None,
      raise_on_error=True,
    )

  print('{}', flush=True)
  for line in sys.stdin:
    request = json.loads(line)
    _limit(request['seconds'])
    try:
      right = math_verify.verify(
        gold=parsed(request['gold']),
        target=parsed(request['answer']),
        timeout_seconds=None,
        raise_on_error=True,
      )
      reply = {'right': bool(right)}
    except Exception as error:  # of sympy, of antlr: there are many
      reply = {'error': f'{type(error).__name__}: {error!s:.200}'}
    print(json.dumps(reply), flush=True)


if __name__ == '__main__':
  main()
