"""The answer to one request, while the tokens of its samples come.

Whole or streamed, it has the same parts: a sample's text, with the prompt
before it for `echo`, why it ended, and log-probabilities. Those have three
forms: columns for completions, a list of tokens for a chat, and a table by id,
vLLM's prompt_logprobs.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from typing import NamedTuple

import numpy as np
from starlette import requests

from .. import text
from ..opened import TextModel
from . import programs, scheduler
from .body import Refused
from .engine import Engine
from .spelling import Places, Spelling
from .validation import Request


class Word(NamedTuple):
  """A token in an answer.

  log_prob: None for a text's first one. top: its alternatives, (token,
  log-probability) each, the likeliest first. place: of its first character.
  """

  token: int
  log_prob: float | None
  top: tuple
  place: int


class _Sample:
  """A sample's text so far; `words` are sent, or wait for the whole answer."""

  def __init__(self, stream: text.TextStream, places: Places):
    self.stream, self.places = stream, places
    self.has_begun = self.has_role = False
    self.total, self.count = 0.0, 0
    self.text, self.reason = '', ''
    self.words: list[Word] = []

  @property
  def mean(self) -> float:
    """Its log-probability per token."""
    return self.total / max(self.count, 1)


class Answer:
  """The answer to a request.

  Sample i is number `i % request.samples` of prompt `i // request.samples`.
  """

  def __init__(
    self,
    engine: Engine,
    model: TextModel,
    name: str,
    request: Request,
    is_chat: bool,
  ):
    self._engine, self._model, self._request = engine, model, request
    self._spelling = Spelling(model.tokenizer)
    self._is_chat = is_chat
    self._tickets, self._events = [], asyncio.Queue()
    self._bos = [model.config.bos_id]
    echoes = [
      model.tokenizer.decode(ids[ids[:1] == self._bos :])
      if request.echo
      else ''
      for ids in request.prompts
    ]
    self._echoes = echoes
    self._scores: list[programs.Scores | None] = [None] * len(echoes)
    self._samples = [
      _Sample(
        text.TextStream(model.tokenizer, request.stops),
        Places(self._spelling, len(echo)),
      )
      for echo in echoes
      for _ in range(request.samples)
    ]
    self._open = set(range(len(self._samples)))
    kind = 'chat.completion' if is_chat else 'text_completion'
    prefix = 'chatcmpl' if is_chat else 'cmpl'
    self._head = {
      'id': f'{prefix}-{secrets.token_hex(12)}',
      'object': kind + ('.chunk' if is_chat and request.stream else ''),
      'created': int(time.time()),
      'model': name,
    }

  async def submit(self) -> None:
    """Submits every prompt, or none."""
    request = self._request
    ends = () if request.ignore_eos else self._model.stop_ids
    self._tickets, self._events = await self._engine.submit(
      request.prompts,
      request.max_new_tokens,
      samples=request.samples,
      stop_ids=(*ends, *request.stop_ids),
      seed=request.seed,
      alternatives=request.logprobs > 0,
      scored=request.prompt_logprobs >= 0 or self._has_echoed_scores,
      **request.knobs,
    )

  async def whole(self, http: requests.Request) -> dict:
    """Returns the answer in one piece."""
    async for sample, piece, words, reason in self._pieces(http):
      sample.text += piece
      sample.words += words
      sample.reason = reason
    request, choices = self._request, []
    for start in range(0, len(self._samples), request.samples):
      drawn = self._samples[start : start + request.samples]
      if request.samples > request.choices:  # the likeliest ones
        drawn = sorted(drawn, key=lambda s: s.mean, reverse=True)
      for s in drawn[: request.choices]:
        choice = self._choice(
          len(choices), s, s.text, s.words, s.reason, key='message'
        )
        choices.append(choice | self._prompt_log_probs(start))
    out = {**self._head, 'choices': choices, 'usage': self._usage()}
    if self._is_chat:
      out |= self._prompt_log_probs(0)
    return out

  async def lines(self):
    """Yields the answer as server-sent events."""
    line = lambda value: f'data: {json.dumps(value, ensure_ascii=False)}\n\n'
    head = self._head
    if self._request.usage:  # of all chunks, the last one has a value
      head = {**head, 'usage': None}
    try:
      async for sample, piece, words, reason in self._pieces():
        i = self._samples.index(sample)
        choice = self._choice(i, sample, piece, words, reason, key='delta')
        yield line({**head, 'choices': [choice]})
    except Refused as error:
      yield line({'error': {'message': str(error), 'type': 'server_error'}})
    if self._request.usage:
      yield line({**head, 'choices': [], 'usage': self._usage()})
    yield 'data: [DONE]\n\n'

  @property
  def _has_echoed_scores(self) -> bool:
    return self._request.echo and self._request.logprobs >= 0

  async def _pieces(self, http: requests.Request | None = None):
    """Yields (sample, its next text, its words, reason) until all have ended.

    It ends early when the client of `http` has gone.
    """
    try:
      while self._open:
        try:
          message = await asyncio.wait_for(self._events.get(), 0.5)
        except TimeoutError:
          message = ()
        if http and await http.is_disconnected():
          return
        if message is None:
          raise Refused(500, 'the engine has failed')
        if message and message[0] in self._open:
          yield self._piece(*message)
    finally:  # frees the rows of samples that still run
      self._engine.cancel(self._tickets)

  def _piece(self, i: int, event: scheduler.Event) -> tuple:
    """Returns the piece of one event, in the form that `_pieces` yields."""
    sample, reason = self._samples[i], event.reason
    if reason == 'broken' or not _is_finite(event.scores):
      raise Refused(500, "the model's logits are not finite")
    if reason == 'failed':
      raise Refused(500, 'an error has ended this request; its log has more')
    piece, words = '', []
    if not sample.has_begun:
      sample.has_begun = True
      prompt = i // self._request.samples
      piece = self._echoes[prompt]
      self._scores[prompt] = event.scores
      if self._has_echoed_scores:
        words = self._prompt_words(prompt)
    ids = []
    if event.token >= 0:
      sample.count += 1
      sample.total += event.log_prob
      place = sample.places.add(event.token)
      words.append(Word(event.token, event.log_prob, event.alternatives, place))
      ids = [] if reason == 'stop' else [event.token]
    piece += sample.stream.add(ids, last=bool(reason))
    if sample.stream.ended:  # perhaps by its last token, too
      if not reason:
        self._engine.cancel([event.ticket])
      reason = 'stop'
    if reason:
      self._open.discard(i)
    return sample, piece, words, reason

  def _prompt_words(self, prompt: int) -> list[Word]:
    """Returns the words of a prompt whose scores have come."""
    scores, ids = self._scores[prompt], self._request.prompts[prompt]
    places = Places(self._spelling)
    words = [Word(ids[0], None, (), 0)]
    if ids[:1] != self._bos:  # which is no part of the text
      places.add(ids[0])
    columns = (scores.log_probs, scores.top.tokens, scores.top.log_probs)
    rows = zip(ids[1:], *(x.tolist() for x in columns), strict=True)
    for token, log_prob, tokens, log_probs in rows:
      top = tuple(zip(tokens, log_probs, strict=True))
      words.append(Word(token, log_prob, top, places.add(token)))
    return words

  def _choice(self, i, sample, piece, words, reason, key) -> dict:
    """Returns a sample's part of the answer; `key` is that of a chat's text."""
    choice = {'index': i, 'finish_reason': reason or None, 'logprobs': None}
    if self._request.logprobs >= 0:
      form = self._chat_log_probs if self._is_chat else self._log_probs
      choice['logprobs'] = form(words)
    if not self._is_chat:
      return choice | {'text': piece}
    choice[key] = {'content': piece}
    if not sample.has_role:
      sample.has_role = True
      choice[key] = {'role': 'assistant', 'content': piece}
    if key == 'message':
      choice[key]['refusal'] = None
    return choice

  def _log_probs(self, words: list[Word]) -> dict:
    """Returns the log-probabilities of completions."""
    name = lambda token: self._spelling.name(token, self._request.as_ids)
    tops = []
    for word in words:
      # The token itself first: it is there even if it is none of the likeliest.
      top = {name(word.token): word.log_prob}
      for token, log_prob in word.top[: self._request.logprobs]:
        top.setdefault(name(token), log_prob)
      tops.append(None if word.log_prob is None else top)
    return {
      'tokens': [name(word.token) for word in words],
      'token_logprobs': [word.log_prob for word in words],
      'top_logprobs': tops,
      'text_offset': [word.place for word in words],
    }

  def _chat_log_probs(self, words: list[Word]) -> dict:
    """Returns the log-probabilities of a chat."""

    def one(token, log_prob):
      return {
        'token': self._spelling.name(token, self._request.as_ids),
        'logprob': log_prob,
        'bytes': list(self._spelling.data(token)),
      }

    content = []
    for word in words:
      top = [one(*pair) for pair in word.top[: self._request.logprobs]]
      content.append(one(word.token, word.log_prob) | {'top_logprobs': top})
    return {'content': content, 'refusal': None}

  def _prompt_log_probs(self, i: int) -> dict:
    """Returns vLLM's field of the prompt of sample i, if it is wanted."""
    count = self._request.prompt_logprobs
    prompt = i // self._request.samples
    scores = self._scores[prompt]
    if count < 0 or scores is None:
      return {}
    tables = [None]
    words = self._prompt_words(prompt)[1:]
    for word, rank in zip(words, scores.ranks.tolist(), strict=True):
      ranked = [(word.token, word.log_prob, rank)]
      ranked += [(*pair, j + 1) for j, pair in enumerate(word.top[:count])]
      table = {}
      for token, log_prob, place in ranked:
        value = {'logprob': log_prob, 'rank': place}
        value['decoded_token'] = self._spelling.name(token)
        table.setdefault(str(token), value)
      tables.append(table)
    return {'prompt_logprobs': tables}

  def _usage(self) -> dict:
    prompt_tokens = sum(map(len, self._request.prompts))
    tokens = sum(sample.count for sample in self._samples)
    return {
      'prompt_tokens': prompt_tokens,
      'completion_tokens': tokens,
      'total_tokens': prompt_tokens + tokens,
    }


def _is_finite(scores: programs.Scores | None) -> bool:
  """Returns whether no position of a prompt had broken logits."""
  return scores is None or bool(
    np.isfinite(scores.log_probs).all()
    and np.isfinite(scores.top.log_probs).all()
  )
