"""The fields of OpenAI's protocol, and the values that the server answers.

Clients send many fields by themselves. `validation` parses those that the
server obeys. Of the others, OpenAI's and vLLM's, a value that changes nothing
is accepted, and any other one is refused by its name and value: nothing in a
request is left out in silence. docs/serving.md has the same table with
examples, and a test reads it.
"""

from __future__ import annotations

# The sampling parameters, those of `sampling.make_knobs` but the seed.
KNOBS = {
  'temperature': 1.0,
  'top_p': 1.0,
  'top_k': 0,
  'min_p': 0.0,
  'repetition_penalty': 1.0,
}
BOTH = {
  'model', 'max_tokens', 'max_completion_tokens', 'n', 'best_of', 'stop',
  'stop_token_ids', 'ignore_eos', 'stream', 'stream_options', 'seed',
  'logprobs', 'prompt_logprobs', 'return_tokens_as_token_ids', *KNOBS,
}  # fmt: skip
COMPLETIONS = {'prompt', 'suffix', 'echo', 'add_special_tokens'}
CHAT = {'messages', 'top_logprobs'}

# They say nothing about the answer.
ANY = {
  'user', 'metadata', 'safety_identifier', 'prompt_cache_key',
  'prompt_cache_retention', 'request_id', 'cache_salt', 'parallel_tool_calls',
}  # fmt: skip

# By field, the values that change nothing. Null and empty ones do not, either;
# nor do false and 0 as the values of an unknown field.
HARMLESS = {
  'frequency_penalty': (0,),
  'presence_penalty': (0,),
  'logit_bias': (),
  'response_format': ({'type': 'text'},),
  'store': (False,),
  'service_tier': ('auto', 'default'),
  'modalities': (['text'],),
  'tools': (),
  'tool_choice': ('none', 'auto'),
  'functions': (),
  'function_call': ('none', 'auto'),
  'audio': (),
  'prediction': (),
  'reasoning_effort': ('none',),
  'verbosity': ('medium',),
  'web_search_options': (),
  'moderation': (),
  # vLLM's
  'use_beam_search': (False,),
  'length_penalty': (1,),
  'min_tokens': (0,),
  'include_stop_str_in_output': (False,),
  'skip_special_tokens': (True,),
  'spaces_between_special_tokens': (True,),
  'truncate_prompt_tokens': (),
  'allowed_token_ids': (),
  'bad_words': (),
  'logits_processors': (),
  'prompt_embeds': (),
  'structured_outputs': (),
  'guided_json': (),
  'guided_regex': (),
  'guided_choice': (),
  'guided_grammar': (),
  'priority': (0,),
  'return_token_ids': (False,),
  'kv_transfer_params': (),
  'vllm_xargs': (),
  'chat_template': (),
  'chat_template_kwargs': (),
  'documents': (),
  'add_generation_prompt': (True,),
  'continue_final_message': (False,),
  'include_reasoning': (True,),
  'mm_processor_kwargs': (),
}


def changes_nothing(field: str, value: object) -> bool:
  """Returns whether a field that the server does not obey may have a value."""
  if field in ANY or value in (None, '', [], {}):
    return True
  return value in HARMLESS.get(field, (False, 0))
