"""Arithmetic that a model wrote, evaluated without running it.

An answer is text by a policy that is paid for a number, so it is hostile: it
may be `9**9**9`, ten thousand brackets, or code. `value` parses at most 256
characters into Python's syntax tree and walks the few kinds of nodes that it
knows, in exact fractions. There is no power, no name and no call, so that the
work is bounded by the length of the text.
"""

from __future__ import annotations

import ast
import operator
from fractions import Fraction

LONGEST = 256  # characters of an expression
_DIGITS = 12  # of one number
_NODES = 64
_DEPTH = 20
_OPERATORS = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
}


def value(text: str) -> tuple[Fraction, list[int]] | None:
  """Returns the exact value and the numbers used, in the order of the text.

  None: it is no arithmetic of + - * / and whole numbers, it is too long or too
  deep, or it divides by zero.
  """
  text = text.strip()
  if not text or len(text) > LONGEST or not text.isascii():
    return None
  try:
    tree = ast.parse(text, mode='eval')
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return None
  if sum(1 for _ in ast.walk(tree)) > 3 * _NODES:
    return None
  numbers: list[int] = []
  try:
    return _walk(tree.body, numbers, 0), numbers
  except (_NoArithmetic, ZeroDivisionError):
    return None


class _NoArithmetic(Exception):
  pass


def _walk(node: ast.AST, numbers: list[int], depth: int) -> Fraction:
  if depth > _DEPTH or len(numbers) > _NODES:
    raise _NoArithmetic
  if isinstance(node, ast.Constant) and type(node.value) is int:
    if abs(node.value) >= 10**_DIGITS:
      raise _NoArithmetic
    numbers.append(node.value)
    return Fraction(node.value)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    return -_walk(node.operand, numbers, depth + 1)
  if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
    left = _walk(node.left, numbers, depth + 1)
    right = _walk(node.right, numbers, depth + 1)
    return _OPERATORS[type(node.op)](left, right)
  raise _NoArithmetic
