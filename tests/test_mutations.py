"""The mutation run itself: the changes that it makes, the tests it picks."""

import ast
import types

import mutants
import mutations

SOURCE = '''"""Not 1 + 1."""
RATE = 0.5

class Size:
  width: int = 3

def area(x: 'a + b', k=-1):
  if k is None or not x:
    raise ValueError(f'{x + 1}')
  return jnp.where(x >= k, x.sum(axis=0) - 2, jnp.minimum(x, True))
'''


def test_mutations_are_programs_that_differ_in_their_arithmetic():
  changed = [m.apply(SOURCE) for m in mutations.mutations('a.py', SOURCE)]
  assert len({ast.dump(ast.parse(text)) for text in changed}) == len(changed)
  lines = SOURCE.splitlines()
  pairs = [list(zip(lines, c.splitlines(), strict=True)) for c in changed]
  assert [[new for old, new in p if old != new] for p in pairs] == [
    ['RATE = 1.0'],
    ["def area(x: 'a + b', k=1):"],
    ["def area(x: 'a + b', k=-2):"],
    ['  if k is None and not x:'],
    ['  if k is None or x:'],
    *(
      [f'  return jnp.where({words}']
      for words in (
        'x >= k, jnp.minimum(x, True), x.sum(axis=0) - 2)',
        'x > k, x.sum(axis=0) - 2, jnp.minimum(x, True))',
        'x >= k, x.sum(axis=0) + 2, jnp.minimum(x, True))',
        'x >= k, x.sum(axis=0), jnp.minimum(x, True))',
        'x >= k, x.mean(axis=0) - 2, jnp.minimum(x, True))',
        'x >= k, x.sum(axis=1) - 2, jnp.minimum(x, True))',
        'x >= k, x.sum(axis=0) - 3, jnp.minimum(x, True))',
        'x >= k, x.sum(axis=0) - 2, jnp.maximum(x, True))',
        'x >= k, x.sum(axis=0) - 2, jnp.minimum(x, False))',
      )
    ),
  ]


def test_the_cheapest_tests_that_reach_the_line_are_chosen():
  tests = [
    mutants.Test('a.py::slow', 9.0, {'x.py': [4]}),
    mutants.Test('b.py::elsewhere', 0.1, {'x.py': [3]}),
    mutants.Test('a.py::quick', 1.0, {'x.py': [5, 6]}),
    mutants.Test('b.py::quick', 2.0, {'x.py': [4], 'y.py': [1]}),
    mutants.Test('b.py::other', 0.1, {'y.py': [4]}),
  ]
  mutation = types.SimpleNamespace(file='x.py', function='f', lines=(4, 5))
  names = lambda budget: [
    t.name for t in mutants.choose(mutation, tests, budget)
  ]
  assert names(3.5) == ['a.py::quick', 'b.py::quick']
  assert names(20) == ['b.py::quick', 'a.py::quick', 'a.py::slow']
  mutation.function = ''
  assert names(3.5) == ['a.py::quick', 'b.py::elsewhere', 'b.py::quick']
