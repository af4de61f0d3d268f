"""The terminal's chat: turns, commands, Ctrl-C, and templates of one's own."""

import pathlib
import signal
import sys
import types

import children
import pytest

from experiments import chat, cli, opened, text
from experiments.data import tokenizer
from experiments.serving import scheduler, template
from mla_moe import ConfigError, ModelConfig

ROOT = pathlib.Path(__file__).parents[2]
WORDS = tokenizer.ByteTokenizer()
PLAIN = (
  '{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'
  'assistant: '
)


class Parrot:
  """A scheduler that answers 'ab', 'cd', ..., one byte a step."""

  length = 200

  def __init__(self, interrupt=False):
    self.prompts, self.ended, self._left = [], [], []
    self._interrupt, self._finite = interrupt, True

  @property
  def busy(self):
    return bool(self._left)

  def submit(self, ids, limit, *, stop_ids, **knobs):
    self.prompts.append(WORDS.decode(ids))
    first = ord('a') + 2 * (len(self.prompts) - 1)
    self._left = [first, first + 1, *stop_ids][:limit]
    return [len(self.prompts)]

  def step(self):
    token = self._left.pop(0)
    if self._interrupt:
      signal.raise_signal(signal.SIGINT)
    reason = 'stop' if token == WORDS.eos_id else ''
    return [scheduler.Event(len(self.prompts), token, 0.0, reason)]

  def cancel(self, ticket):
    self.ended.append(ticket)
    self._left = []


def made(folder, work=None, **options):
  config = ModelConfig(vocab=264, max_positions=200)
  model = opened.TextModel(
    config, {}, WORDS, folder, (WORDS.eos_id,), template=PLAIN
  )
  return chat.Chat(model, work or Parrot(), **options)


def reader(*lines):
  """Returns `read` of these lines; an exception among them is raised."""
  rest = [*lines, EOFError()]

  def read():
    line = rest.pop(0)
    if isinstance(line, BaseException):
      raise line
    return line

  return read


@pytest.fixture(autouse=True)
def jinja2():
  pytest.importorskip('jinja2')


def test_a_turn_sees_the_turns_before_it(tmp_path, capsys):
  talk = made(tmp_path, system='be kind')
  lines = 'hi', '', KeyboardInterrupt(), 'why', '/reset', '/help', 'hi'
  chat.talk(talk, reader(*lines, '/quit', 'never'), interactive=True)
  out, err = capsys.readouterr()
  assert out == 'ab\ncd\nef\n'
  start = 'system: be kind\nuser: hi\nassistant: '
  prompts = talk._scheduler.prompts
  assert prompts == [start, f'{start}ab\nuser: why\nassistant: ', start]
  assert talk.messages[-1] == ('assistant', 'ef') and len(talk.messages) == 3
  assert '/help: there is only /reset and /quit' in err
  assert err.count('compiling, once') == err.count('Compiled in') == 1


def test_ctrl_c_ends_the_answer_and_not_the_chat(tmp_path, capsys):
  work = Parrot(interrupt=True)
  talk = made(tmp_path, work)
  before = signal.getsignal(signal.SIGINT)
  chat.talk(talk, reader('hi', 'hi'), interactive=True)
  assert capsys.readouterr().out == 'a\nc\n'
  assert talk.messages[1::2] == [('assistant', 'a'), ('assistant', 'c')]
  assert work.ended == [1, 2] and not work.busy
  assert signal.getsignal(signal.SIGINT) is before


def test_a_terminal_obeys_no_model(monkeypatch, capsys):
  piece = 'a\x1b[2J\x07\r\nb\tc\x9b\n'
  text.show(piece)  # a pipe gets all bytes
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  text.show(piece)
  whole = 'a\ufffd[2J\ufffd\nb\tc\ufffd\n'
  assert capsys.readouterr().out == piece + whole


def test_a_chat_without_room_is_refused_in_one_line(tmp_path, capsys):
  talk = made(tmp_path)
  with pytest.raises(ConfigError, match='of at most 200: /reset it') as error:
    chat.talk(talk, reader('x' * 200), interactive=False)
  assert '\n' not in str(error.value) and not talk.messages
  chat.talk(talk, reader('x' * 200, 'hi'), interactive=True)
  out, err = capsys.readouterr()
  assert out == 'ab\n' and '/reset it' in err


def test_a_stop_text_and_the_limit_end_an_answer(tmp_path):
  assert ''.join(made(tmp_path, stops=('b',)).answer('hi')) == 'a'
  assert ''.join(made(tmp_path, max_new_tokens=1).answer('hi')) == 'a'


def test_broken_logits_end_the_program(tmp_path):
  work = Parrot()
  work.step = lambda: [scheduler.Event(1, 0, 0.0, 'broken')]
  with pytest.raises(cli.Stopped, match='not finite'):
    list(made(tmp_path, work).answer('hi'))
  assert work.ended == [1]


def test_a_template_of_one_s_own_comes_before_the_folder_s(
  tmp_path, monkeypatch
):
  path = tmp_path / 'mine.jinja'
  flag = types.SimpleNamespace(chat_template=str(path))
  monkeypatch.setattr(template, 'FLAGS', flag)
  for content, words in (
    (None, 'cannot be read'),
    (b'\xff', 'UTF-8'),
    (b' \n', 'is empty'),
    (b'{% broken', 'template fails'),
  ):
    if content is not None:
      path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
      template.own()
    assert '\n' not in str(error.value)
  path.write_text('{{ bos_token }}{{ messages[0].content }}{{ eos_token }}')
  (tmp_path / 'chat_template.jinja').write_text("the folder's")
  ids = template.prompt(tmp_path, WORDS, 'hi', own=template.own())
  assert ids.tolist() == [WORDS.bos_id, *b'hi', WORDS.eos_id]
  flag.chat_template = ''
  assert template.own() == ''


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
def test_a_pipe_is_answered_as_generate_does(tmp_path):
  """And the first answer says that it compiles, in both."""
  (tmp_path / 'plain.jinja').write_text(PLAIN)
  flags = [f'--checkpoint={ROOT}/tests/golden/v2_lite', '--tokenizer=byte']
  flags += [f'--chat_template={tmp_path}/plain.jinja', '--max_new_tokens=8']

  def run(program, *words, **more):
    module = f'experiments.{program}'
    done = children.run('-m', module, *flags, *words, **more)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('compiling, once') == 1
    assert done.stderr.count('Compiled in') == 1
    return done.stdout

  alone = run('generate', '--chat', '--prompt=hello')
  piped = run('chat', '--length=128', input='hello\n/reset\nhello\n')
  assert piped == 2 * alone and alone.strip()
