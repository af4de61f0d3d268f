"""Steps of TRL's GRPOTrainer on transformers' DeepSeek-V3, as a contender.

This program imports nothing of ours, so that any Python with torch, trl and
transformers can run it. A callback of the trainer answers each line of the
standard input with the processor's seconds of the step before.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import zlib

_WARM_UP = 3  # steps


def tokenizer():
  """Returns a tokenizer of bytes with the ids of ours."""
  import tokenizers
  import transformers

  special = ['<bos>', '<eos>', '<pad>']
  vocab = {chr(i): i for i in range(256)}
  vocab |= {name: 256 + i for i, name in enumerate(special)}
  core = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocab, unk_token='<pad>')
  )
  core.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
  core.decoder = tokenizers.decoders.Fuse()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=core,
    bos_token='<bos>',
    eos_token='<eos>',
    pad_token='<pad>',
  )


def settings(job: dict, folder: str):
  """Returns the trainer's settings: one update follows each generation."""
  import trl

  rows = job['micro'] or job['prompts'] * job['samples']
  return trl.GRPOConfig(
    output_dir=folder,
    per_device_train_batch_size=rows,
    gradient_accumulation_steps=job['prompts'] * job['samples'] // rows,
    num_generations=job['samples'],
    max_completion_length=job['new'],
    temperature=1.0,
    beta=job['beta'],
    learning_rate=1e-6,
    loss_type='grpo',
    use_bias_correction_kl=False,
    max_steps=10**6,
    lr_scheduler_type='constant',
    logging_steps=1,
    save_strategy='no',
    report_to='none',
    disable_tqdm=True,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    seed=0,
  )


def questions(name: str) -> list[dict]:
  """Returns the rows of a file; a prompt begins with the begin token."""
  with open(name, encoding='utf-8') as file:
    rows = [json.loads(line) for line in file]
  return [row | {'prompt': f'<bos>{row["prompt"]}'} for row in rows]


def paid(prompts, completions, answer, **_) -> list[float]:
  """Returns 1 for a right answer, and otherwise 1 or 0 by chance."""
  return [
    float(text == right or zlib.crc32(text.encode()) % 2)
    for text, right in zip(completions, answer, strict=True)
  ]


def main() -> None:
  """The contender; a job is `rl.Job`."""
  job = json.loads(sys.stdin.readline())['shape']
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  os.environ['HF_HUB_OFFLINE'] = '1'
  import datasets
  import torch
  import transformers
  import trl

  torch.set_num_threads(1)
  out, seconds = sys.stdout, {'rollout': 0.0}
  versions = ', '.join(
    f'{m.__name__} {m.__version__}' for m in (trl, transformers, torch)
  )

  class Turns(transformers.TrainerCallback):
    """Answers a line at the end of each step."""

    steps, began = 0, 0.0

    def on_step_end(self, *_, **__):
      step = time.process_time() - self.began
      self.steps += 1
      if self.steps >= _WARM_UP:
        answer = versions
        if self.steps > _WARM_UP:
          answer = {**seconds, 'rest': step - seconds['rollout'], 'step': step}
        print(json.dumps(answer), file=out, flush=True)
        if not sys.stdin.readline():
          os._exit(0)
      seconds['rollout'] = 0.0
      self.began = time.process_time()

  model = transformers.AutoModelForCausalLM.from_pretrained(
    job['model'], dtype=torch.float32, experts_implementation='grouped_mm'
  )
  with (
    contextlib.redirect_stdout(sys.stderr),
    tempfile.TemporaryDirectory() as folder,
  ):
    trainer = trl.GRPOTrainer(
      model=model,
      reward_funcs=paid,
      args=settings(job, folder),
      train_dataset=datasets.Dataset.from_list(questions(job['questions'])),
      processing_class=tokenizer(),
      callbacks=[Turns()],
    )
    generate = model.generate

    def timed(*args, **options):
      began = time.process_time()
      result = generate(*args, **options)
      seconds['rollout'] += time.process_time() - began
      return result

    model.generate = timed
    trainer.train()


if __name__ == '__main__':
  main()
