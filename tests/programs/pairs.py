"""Both processes of `one_of_two`."""

import pathlib
import signal

import children

_PROGRAM = pathlib.Path(__file__).parent / 'one_of_two.py'


def stopped(folder, *place):
  """The last lines of both processes, of which the second got SIGTERM."""
  both = [
    children.Child(_PROGRAM, rank, folder, *place, env=children.on_devices(2))
    for rank in range(2)
  ]
  try:
    while both[1].stdout.readline() not in ('ready\n', ''):
      pass  # gloo prints, too
    both[1].send_signal(signal.SIGTERM)
    outputs = [child.communicate() for child in both]
  finally:
    for child in both:
      child.kill()
  assert [child.returncode for child in both] == [0, 0], outputs
  return [out.splitlines()[-6:] for out, _ in outputs]
