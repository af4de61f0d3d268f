"""The syntax of the source files, parsed once for a worker's tests."""

import ast
import functools


@functools.cache
def tree(path):
  return ast.parse(path.read_text(encoding='utf-8'))
