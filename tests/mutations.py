"""Wrong programs, one small change each, for `mutants.py`.

A mutation replaces a piece of a module's text: another operator, another bound
of a comparison, a lost sign or term, an index, axis or constant one beside its
own, a condition reversed, a function exchanged for its counterpart. Positions
come from the syntax tree, so all other lines stay as they are. Left alone are
annotations, decorators, messages, the fields of classes, and comparisons with
None, which decide between kinds of values and not about numbers.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator

OPERATORS = {
  ast.Add: ('+', '-'),
  ast.Sub: ('-', '+'),
  ast.Mult: ('*', '/'),
  ast.Div: ('/', '*'),
  ast.FloorDiv: ('//', '*'),
  ast.Mod: ('%', '//'),
  ast.Pow: ('**', '*'),
  ast.BitAnd: ('&', '|'),
  ast.BitOr: ('|', '&'),
  ast.Lt: ('<', '<='),
  ast.LtE: ('<=', '<'),
  ast.Gt: ('>', '>='),
  ast.GtE: ('>=', '>'),
  ast.Eq: ('==', '!='),
  ast.NotEq: ('!=', '=='),
  ast.And: ('and', 'or'),
  ast.Or: ('or', 'and'),
}
_PAIRS = (
  *(('minimum', 'maximum'), ('min', 'max'), ('argmin', 'argmax')),
  *(('any', 'all'), ('cos', 'sin'), ('floor', 'ceil'), ('sum', 'mean')),
  *(('zeros', 'ones'), ('zeros_like', 'ones_like'), ('rsqrt', 'sqrt')),
  ('logical_and', 'logical_or'),
)
COUNTERPARTS = dict([*_PAIRS, *(pair[::-1] for pair in _PAIRS)])
# Functions of one array, in place of which the array alone will do.
DROPPED = ('stop_gradient', 'abs', 'flip', 'psum', 'pmean')
# Calls whose arguments are names for people and for the compiler.
_NAMING = ('checkpoint_name', 'named_scope')


@dataclasses.dataclass(frozen=True)
class Mutation:
  """One change of a file: `before` becomes `after` from `start` to `end`."""

  file: str
  function: str  # the qualified name, '' outside of functions
  lines: tuple[int, int]  # the first and last line of its statement
  start: int  # in characters of the text
  end: int
  before: str  # the line of `start`, stripped, and the same line changed
  after: str
  replacement: str
  line: int

  @property
  def key(self) -> str:
    """The change without its position, which moves as the file grows."""
    return f'{self.file} | {self.function} | {self.before} -> {self.after}'

  def apply(self, text: str) -> str:
    """Returns the file's text with this change."""
    return text[: self.start] + self.replacement + text[self.end :]


def mutations(file: str, text: str) -> Iterator[Mutation]:
  """Yields all mutations of a module, in the order of its syntax tree."""
  offsets = [0]
  for line in text.splitlines(keepends=True):
    offsets.append(offsets[-1] + len(line))
  assert text.isascii(), file  # columns count bytes, and offsets characters
  place = lambda line, column: offsets[line - 1] + column
  for node, function, statement in _arithmetic(ast.parse(text)):
    for start, end, replacement in _changes(node, text, place):
      line = text.count('\n', 0, start)
      left, right = offsets[line], offsets[line + 1]
      changed = text[left:start] + replacement + text[end : max(right, end)]
      yield Mutation(
        file=file,
        function=function,
        lines=(statement.lineno, _last_line(statement)),
        start=start,
        end=end,
        before=text[left:right].strip(),
        after=' '.join(changed.split()),
        replacement=replacement,
        line=line + 1,
      )


def _last_line(statement):
  """The statement's last line, or that of its condition where it has a body.

  A function's defaults count wherever the function runs.
  """
  body = getattr(statement, 'body', None)
  if isinstance(body, list) and not isinstance(statement, ast.FunctionDef):
    return body[0].lineno
  return statement.end_lineno


def _arithmetic(tree, function='', statement=None) -> Iterator[tuple]:
  """(node, function, statement) of each node that computes something."""
  for field, value in ast.iter_fields(tree):
    for node in value if isinstance(value, list) else [value]:
      if not isinstance(node, ast.AST) or _is_left_alone(tree, field, node):
        continue
      name, around = function, statement
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        name = f'{function}.{node.name}'.strip('.')
      if isinstance(node, ast.stmt):
        around = node
      yield node, name, around
      yield from _arithmetic(node, name, around)


def _is_left_alone(parent, field, node):
  if field in ('annotation', 'returns', 'decorator_list', 'format_spec'):
    return True
  if isinstance(parent, ast.ClassDef) and isinstance(node, ast.AnnAssign):
    return True
  if isinstance(node, ast.keyword):
    return node.arg == 'strict'  # of zip: a check
  if isinstance(node, ast.Call):
    return _called(node) in _NAMING
  return isinstance(
    node, ast.Raise | ast.Assert | ast.JoinedStr | ast.ImportFrom | ast.Import
  )


def _called(call):
  return getattr(call.func, 'attr', getattr(call.func, 'id', ''))


def _changes(node, text, place) -> Iterator[tuple[int, int, str]]:
  """(start, end, replacement) of each change of one node."""
  begin = lambda x: place(x.lineno, x.col_offset)
  end = lambda x: place(x.end_lineno, x.end_col_offset)
  piece = lambda x: text[begin(x) : end(x)]
  whole = lambda: (begin(node), end(node))

  def between(left, right, kind):
    if kind in OPERATORS:
      old, other = OPERATORS[kind]
      at = text.find(old, end(left), begin(right))
      yield at, at + len(old), other

  match node:
    case ast.BinOp(left, op, right):
      yield from between(left, right, type(op))
      if isinstance(op, ast.Add | ast.Sub):
        yield *whole(), piece(left)
    case ast.BoolOp(op, [left, right, *_]):
      yield from between(left, right, type(op))
    case ast.Compare(left, ops, comparators):
      for op, right in zip(ops, comparators, strict=True):
        yield from between(left, right, type(op))
        left = right
    case ast.UnaryOp(ast.USub() | ast.Not(), operand):
      yield *whole(), piece(operand)
    case ast.AugAssign(target, op, value):
      yield from between(target, value, type(op))
    case ast.Constant(value) if isinstance(value, bool):
      yield *whole(), str(not value)
    case ast.Constant(value) if isinstance(value, int):
      yield *whole(), str(value + 1)
    case ast.Constant(value) if isinstance(value, float):
      yield *whole(), str(2 * value or 1.0)
    case ast.If(test) | ast.IfExp(test) | ast.While(test):
      if not _is_about_none(test):
        yield begin(test), end(test), f'not ({piece(test)})'
    case ast.Call(func, args):
      yield from _calls(_called(node), func, args, begin, end, piece, whole)


def _calls(name, func, args, begin, end, piece, whole):
  if name in COUNTERPARTS:
    yield end(func) - len(name), end(func), COUNTERPARTS[name]
  if name in DROPPED and args:
    yield *whole(), piece(args[0])
  if name == 'where' and len(args) == 3:
    _, yes, no = args
    yield begin(yes), end(no), f'{piece(no)}, {piece(yes)}'


def _is_about_none(test):
  return any(
    isinstance(node, ast.Is | ast.IsNot | ast.In | ast.NotIn)
    for node in ast.walk(test)
  )
