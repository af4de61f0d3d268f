"""Commands of docs and docstrings: each is parsed, as its program parses it.

Commands in ```sh blocks are run, too (tests/test_docs.py). Those of ```text
blocks, of sentences and of docstrings need a cloud, a download, hours or a
second terminal. Their programs are started here, and stop when the flags, with
the config and its overrides, have been read.
"""

import argparse
import ast
import json
import pathlib
import re
import runpy
import shlex
import sys

import pytest
import syntax

from experiments import __main__ as entry
from experiments import cli
from mla_moe.config import freeze

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
  *sorted((ROOT / 'docs').glob('*.md')),
  *(ROOT / f'{name}.md' for name in ('README', 'CONTRIBUTING', 'SECURITY')),
]
SOURCES = [
  path
  for folder in ('mla_moe', 'experiments', 'configs')
  for path in sorted((ROOT / folder).rglob('*.py'))
]
COMMAND = re.compile(r'python -m experiments\.[a-z_]+1?(?!\w).*')
# What a person puts in: the words of a command that are none.
PUT_IN = {
  '--config=...': '--config=tiny',
  '--config=FILE': '--config=tiny',
  '--config=mine.py': '--config=tiny',
  '--config={0}/config.py': '--config=tiny',
  '--workdir={0}': '--workdir=DIR',
  '--steps=N': '--steps=3',
  '--vocab=N': '--vocab=300',
  'NAME': 'train',
  'STEP': '1',
}
PUT_IN_FOR = {
  r'--config=runs/[\w-]+/config\.py': '--config=tiny',
  r'(--config.data.tokenizer)=.*': r'\1=byte',
}


# Others': of ml_collections, and of runpy, whose modules are imported already.
pytestmark = pytest.mark.filterwarnings(
  'ignore:the load_module', 'ignore:.*found in sys.modules'
)


class Parsed(Exception):
  """A program has read its flags."""


def joined(text):
  """The text's lines, those with a backslash at their end as one."""
  return re.sub(r'\\+\n\s*', ' ', text).splitlines()


def documented():
  """{command: place} of blocks, sentences and docstrings, without its shell."""
  places = {}
  for page in PAGES:
    text = page.read_text()
    lines = joined(text)
    spans = re.findall(r'(?<!`)`(python -m [^`]+)`', text)
    for line in lines + [' '.join(span.split()) for span in spans]:
      if '`' not in line and (found := COMMAND.search(line)):
        places.setdefault(found[0], page.name)
  for path in SOURCES:
    tree = syntax.tree(path)
    for line in joined(ast.get_docstring(tree, clean=True) or ''):
      if found := COMMAND.match(line.strip()):
        places.setdefault(found[0], str(path.relative_to(ROOT)))
  return places


def words_of(command):
  """A command's program and words, with something put in where a person does.

  A [word] may be left out, and is not; what follows in the line, after blanks
  or a shell's sign, is no part of it.
  """
  command = re.split(r' #|\s{3,}| &| \||; |, ', command)[0]
  command = re.sub(r'[][]', '', command).replace(' ...', '')
  _, _, program, *words = shlex.split(command)
  words = [PUT_IN.get(word, word).replace('...', '') for word in words]
  for pattern, word in PUT_IN_FOR.items():
    words = [re.sub(pattern, word, w) for w in words if w != 'flags']
  return program, words


@pytest.fixture
def parse(monkeypatch):
  """Starts a program and stops it when it has read its flags."""
  parse_args = argparse.ArgumentParser.parse_args

  def run(main, define=cli.define, has_words=False):
    before = set(cli.FLAGS)
    with cli.edge():
      try:
        words = cli._parse(define)
        assert has_words or not words, words
        if 'config' in cli.FLAGS:
          freeze(cli.FLAGS.config)
      finally:
        for name in set(cli.FLAGS) - before:
          delattr(cli.FLAGS, name)
        cli.FLAGS.unparse_flags()
    raise Parsed

  def stop(parser, words=None):
    parse_args(parser, words)
    raise Parsed

  monkeypatch.setattr(cli, 'run', run)
  monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', stop)
  monkeypatch.chdir(ROOT)

  def start(program, words):
    monkeypatch.setattr(sys, 'argv', [program, *words])
    runpy.run_module(program, run_name='__main__', alter_sys=True)

  return start


DOCUMENTED = documented()
# They have no flags.
BY_HAND = tuple(f'experiments.{n}' for n in ('report', 'profile', 'doctor'))


@pytest.mark.parametrize('command', DOCUMENTED)
def test_a_documented_command_is_read(command, parse, capsys):
  program, words = words_of(command)
  if program in BY_HAND:
    assert not [w for w in words if w.startswith('-')]
    return
  try:
    with pytest.raises(Parsed):
      parse(program, words)
  except SystemExit as ended:
    if words[-1:] == ['--help'] and not ended.code:
      return
    pytest.fail(f'{DOCUMENTED[command]}: {words}: {capsys.readouterr().err}')


def test_the_commands_are_those_that_people_read():
  assert len(DOCUMENTED) >= 60
  named = {words_of(c)[0].partition('.')[2] for c in DOCUMENTED}
  assert named >= set(entry.programs()) - {'distributed'}


def test_a_wrong_command_is_refused(parse, capsys):
  for words in (['--config=tiny', '--config.optim.rate=1'], ['--stpes=3']):
    with pytest.raises(SystemExit) as ended:
      parse('experiments.train', words)
    assert ended.value.code == 2
  with pytest.raises(SystemExit):
    parse('experiments.checkpoint', ['look', 'DIR'])


@pytest.mark.parametrize('name', entry.programs())
def test_every_program_explains_itself(name, capsys, monkeypatch):
  monkeypatch.setattr(sys, 'argv', [name, '--help'])
  before = set(cli.FLAGS)
  try:
    with pytest.raises(SystemExit) as ended:
      program = f'experiments.{name}'
      runpy.run_module(program, run_name='__main__', alter_sys=True)
      raise SystemExit(0)
  finally:
    for flag in set(cli.FLAGS) - before:
      delattr(cli.FLAGS, flag)
  assert not ended.value.code
  shown = capsys.readouterr().out
  first = entry.programs()[name].split()[:4]
  assert ' '.join(first) in ' '.join(shown.split())


def test_words_of_other_programs():
  """make's targets, extras of pip, a request's JSON: all blocks of text."""
  makefile = (ROOT / 'Makefile').read_text()
  setup = (ROOT / 'setup.py').read_text()
  counts = dict.fromkeys(('make', 'pip', 'curl'), 0)
  for page in PAGES:
    for block in re.findall(
      r'```(?:text|sh)\n(.*?)```', page.read_text(), re.S
    ):
      for line in joined(block):
        words = (
          shlex.split(line, comments=True) if "'" in line else line.split()
        )
        program = words[0] if words else ''
        if program == 'make':
          assert re.search(rf'^{words[1]}:', makefile, re.M), line
        elif program == 'pip':
          for extras in re.findall(r'\[([\w,]+)\]', line):
            for extra in extras.split(','):
              assert f"'{extra}'" in setup, line
        elif program == 'curl':
          json.loads(words[words.index('-d') + 1])
        counts[program] = counts.get(program, 0) + 1
  assert min(counts[name] for name in ('make', 'pip', 'curl')) >= 1


def test_a_config_of_ones_own_is_a_config(tmp_path):
  """mine.py, as docs/index.md has it: whole and as a toy."""
  text = (ROOT / 'docs' / 'index.md').read_text()
  (source,) = re.findall(r'```python\n(.*?)```', text, re.S)
  (tmp_path / 'mine.py').write_text(source)
  make = runpy.run_path(str(tmp_path / 'mine.py'))['get_config']
  whole, toy = freeze(make()), freeze(make('smoke'))
  assert whole.model.dim == 96 and whole.data.source == 'texts/*.txt'
  assert whole.run.steps == 300 and toy.run.steps < 300
