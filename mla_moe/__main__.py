"""The programs by the package's name: `python -m mla_moe train ...`.

They are the folder `experiments`, which a wheel has inside of this package and
a clone beside it. Another installation's folder of that name is left alone.
"""

import importlib.util
import pathlib
import runpy

if __name__ == '__main__':
  root = pathlib.Path(__file__).resolve().parents[1]
  for name in ('mla_moe.experiments', 'experiments'):
    spec = importlib.util.find_spec(name)
    if spec and pathlib.Path(spec.origin).resolve().is_relative_to(root):
      runpy.run_module(name, run_name='__main__', alter_sys=True)
      break
