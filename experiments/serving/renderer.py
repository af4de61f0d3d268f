"""Renders chat templates in a process of its own: the child of `template`.

A template is a program that comes with a model. jinja2's sandbox keeps it from
files and attributes, but not from time (a loop in a loop in a loop) and memory
('x' * 10**9). The kernel's limits of a process bound both. So this file runs
as a program, and imports nothing of the package.

A template sees the real texts, since it may cut, trim or test them. Special
tokens are those that it writes itself. So `Text` remembers which characters
came from the template's own literals, through concatenation, slices and
stripping. All other characters are people's, whichever way they came: an
operation that `Text` does not know forgets, and never invents, an origin.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import signal
import sys

SECONDS = 5  # of a processor, for one chat
MEMORY = 2**29
LENGTH = 2**22  # characters of the chat
ROLES = ('system', 'user', 'assistant', 'developer', 'tool')
_SCOPES = ('_loop_vars', '_block_vars')
_NUMBERS = (int, float, type(None))


class Text(str):
  """A text; `_own` has (start, end) of the characters of the template."""

  _own: tuple[tuple[int, int], ...] = ()

  def __str__(self):
    return self

  def __add__(self, other):
    if not isinstance(other, str):
      return super().__add__(other)  # raises
    return concat((self, other))

  def __radd__(self, other):
    return concat((other, self))

  def __mul__(self, n):
    out = Text(super().__mul__(n))
    ends = (i * len(self) for i in range(n)) if self._own else ()
    out._own = _merged((a + i, b + i) for i in ends for a, b in self._own)
    return out

  __rmul__ = __mul__

  def __mod__(self, values):
    return _derived(super().__mod__(values), (self, values))

  def __getitem__(self, key):
    out = Text(super().__getitem__(key))
    key = key if isinstance(key, slice) else slice(key, key + 1 or None)
    start, end, step = key.indices(len(self))
    if step == 1:
      cut = ((max(a, start) - start, min(b, end) - start) for a, b in self._own)
      out._own = _merged((a, b) for a, b in cut if a < b)
    return out

  def strip(self, *chars):
    return self.lstrip(*chars).rstrip(*chars)

  def lstrip(self, *chars):
    return self[len(self) - len(super().lstrip(*chars)) :]

  def rstrip(self, *chars):
    return self[: len(super().rstrip(*chars))]


def own(text: str) -> Text:
  """Returns a text of the template itself."""
  text = Text(text)
  text._own = ((0, len(text)),) if text else ()
  return text


def concat(parts) -> Text:
  """Returns the parts in a row, each with its origin."""
  parts = list(parts)
  starts = itertools.accumulate(map(len, parts), initial=0)
  out = Text(''.join(parts))
  spans = zip(starts, parts, strict=False)  # one start more than parts
  out._own = _merged(
    (a + n, b + n) for n, part in spans for a, b in getattr(part, '_own', ())
  )
  return out


def traced(text: str) -> tuple[str, list[tuple[int, int]]]:
  """Returns a plain text, and (start, end) of the template's characters."""
  return str.__str__(text), list(getattr(text, '_own', ()))


def text_of(value) -> str:
  """Returns the text that a template prints for a value."""
  if isinstance(value, str):
    return value
  return own(str(value)) if isinstance(value, _NUMBERS) else str(value)


def _merged(spans) -> tuple[tuple[int, int], ...]:
  out = []
  for a, b in spans:
    if out and out[-1][1] == a:
      a = out.pop()[0]
    out.append((a, b))
  return tuple(out)


def _is_own(value) -> bool:
  """Returns whether nothing in a value is a person's."""
  if isinstance(value, str):
    return not value or getattr(value, '_own', ()) == ((0, len(value)),)
  if isinstance(value, (list, tuple)):
    return all(map(_is_own, value))
  return isinstance(value, _NUMBERS)


def _derived(out, inputs):
  """Returns `out`, which is the template's own if all its inputs are."""
  if not all(map(_is_own, inputs)):
    return out
  if isinstance(out, list):
    return [_derived(x, ()) for x in out]
  return own(out) if isinstance(out, str) else out


def _join(separator, values) -> Text:
  parts = [text_of(value) for value in values]
  between = itertools.chain.from_iterable((separator, x) for x in parts)
  return concat(itertools.islice(between, 1, None))


def _filter(function):
  """Returns a filter of jinja2 whose result has an origin."""

  @functools.wraps(function)  # which keeps its mark for the context
  def filtered(*args, **kwargs):
    inputs = args[1:] if hasattr(function, 'jinja_pass_arg') else args
    return _derived(function(*args, **kwargs), (*inputs, *kwargs.values()))

  return filtered


def _generator():
  """Returns jinja2's compiler; literals and printed values become `Text`."""
  from jinja2 import compiler

  class Generator(compiler.CodeGenerator):
    def visit_Const(self, node, frame):
      if isinstance(node.value, str):
        self.write(f'environment.own({node.value!r})')
      else:
        super().visit_Const(node, frame)

    def visit_TemplateData(self, node, frame):
      self.write(f'environment.own({node.data!r})')

    def _output_const_repr(self, group):
      return f'environment.own({"".join(group)!r})'

    def _output_child_pre(self, node, frame, finalize):
      self.write('environment.text_of(')

    def visit_Concat(self, node, frame):
      self.write('environment.concat(map(environment.text_of, (')
      for part in node.nodes:
        self.visit(part, frame)
        self.write(', ')
      self.write(')))')

  return Generator


def _generation():
  """Returns the tag {% generation %}, which marks answers for others."""
  from jinja2 import ext, nodes

  class Generation(ext.Extension):
    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      call = self.call_method('_generated')
      return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _generated(self, caller):
      return caller()

  return Generation


def _namespace():
  """Returns a namespace without names of Python's own, which lead out of a
  sandbox."""
  from jinja2 import exceptions, utils

  def check(name):
    if str(name).startswith('_'):
      raise exceptions.SecurityError(f'a namespace has no {name!r}')

  class Namespace(utils.Namespace):
    def __init__(*args, **values):  # a name may be `self`
      self, *rest = args
      values = dict(*rest, **values)
      any(map(check, values))
      utils.Namespace.__init__(self, values)

    def __setitem__(self, name, value):
      check(name)
      utils.Namespace.__setitem__(self, name, value)

  return Namespace


def _to_json(
  x, ensure_ascii=False, indent=None, separators=None, sort_keys=False
):
  """Returns JSON, without jinja2's escapes for HTML."""
  return json.dumps(
    x,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


@functools.lru_cache(maxsize=1)
def _environment():
  """Returns transformers' environment of a template, with origins."""
  from jinja2 import exceptions, ext, pass_environment, sandbox

  class World(sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _generator()
    own, concat = staticmethod(own), staticmethod(concat)
    text_of = staticmethod(text_of)

    def call(self, context, function, *args, **kwargs):
      method = getattr(function, '__wrapped__', function)  # of the sandbox
      text = getattr(method, '__self__', None)
      if isinstance(text, str) and method.__name__ == 'join' and args:
        return _join(text, args[0])
      out = super().call(context, function, *args, **kwargs)
      if not isinstance(text, str):
        return out
      # jinja2 adds the variables of a loop around the call.
      named = [v for k, v in kwargs.items() if k not in _SCOPES]
      return _derived(out, (text, *args, *named))

  def refuse(message):
    raise exceptions.TemplateError(message)

  @pass_environment
  def join(world, value, d='', attribute=None):
    if attribute is not None:
      value = (world.getitem(x, attribute) for x in value)
    return _join(d, value)

  world = World(
    trim_blocks=True,
    lstrip_blocks=True,
    optimized=False,  # a folded list would lose its origins
    extensions=[_generation(), ext.loopcontrols],
  )
  world.filters['tojson'] = _to_json
  world.filters = {k: _filter(f) for k, f in world.filters.items()}
  world.filters['join'] = join
  world.globals |= {
    'raise_exception': refuse,
    'strftime_now': lambda form: datetime.datetime.now().strftime(form),
    'namespace': _namespace(),
    'dict': lambda *args, **kwargs: dict(*args, **kwargs),
  }
  return world


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
  return _environment().from_string(template)


def render(template: str, values: dict | None, names: dict) -> Text:
  """Returns a rendered chat; without values, the template is only compiled.

  Args:
    template: in Jinja.
    values: 'messages' and 'add_generation_prompt'.
    names: the template's own texts, by name: special tokens.
  """
  from jinja2 import exceptions

  compiled = _compiled(template)
  if values is None:
    return Text()
  for message in values['messages']:
    if message['role'] in ROLES:
      message['role'] = own(message['role'])
  names = {name: own(text) for name, text in names.items()}
  out = compiled.render(tools=None, documents=None, **names | values)
  if len(out) > LENGTH:
    raise exceptions.TemplateError(f'it makes more than {LENGTH} characters')
  return out


def _limit() -> None:
  """Bounds the memory of this process."""
  import resource  # Windows has none: `cli` says so

  for limit, most in (
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_AS, MEMORY),
  ):
    with contextlib.suppress(ValueError, OSError):  # macOS has not all of them
      resource.setrlimit(limit, (most, most))


def main() -> None:
  """Answers requests of `template`, JSON in a line each, until there is none.

  An answer is {'text', 'own'} or {'error'}.
  """
  _limit()
  # A process inherits both from its parent, whose libraries may ignore it.
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_SETMASK, ())
  for line in sys.stdin.buffer:
    request = json.loads(line)
    # The kernel ends this process once it has computed so long.
    signal.setitimer(signal.ITIMER_PROF, request.pop('seconds'))
    try:
      answer = dict(
        zip(('text', 'own'), traced(render(**request)), strict=True)
      )
    except Exception as error:  # it is a program: it may raise anything
      line = ' '.join(f'{type(error).__name__}: {error!s:.400}'.split())
      answer = {'error': line[:200]}
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.write(json.dumps(answer) + '\n')
    sys.stdout.flush()


if __name__ == '__main__':
  main()
