"""Writes TRL's own losses and gradients to goldens/trl.npz, for test_trl.

Run by hand with trl==1.16.0 and torch==2.13.0 installed:

  python tests/rl/make_trl_golden.py

TRL's `GRPOTrainer._compute_loss` runs on log-probabilities that are drawn here
in place of a model's: ragged answers, ratios on both sides of every clip.
"""

import collections
import pathlib
import types

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / 'goldens' / 'trl.npz'
ROWS, LONGEST = 8, 9
# TRL's arguments of each case; test_trl has ours.
CASES = {
  'sequence': {'loss_type': 'grpo'},
  'token': {'loss_type': 'bnpo'},
  'constant': {'loss_type': 'dr_grpo'},
  'dapo': {'loss_type': 'dapo', 'epsilon_high': 0.28},
  'k3': {'loss_type': 'grpo', 'beta': 0.04, 'use_bias_correction_kl': False},
  'unbiased': {'loss_type': 'grpo', 'beta': 0.04},
  'gspo': {
    'loss_type': 'grpo',
    'importance_sampling_level': 'sequence',
    'epsilon_low': 3e-4,
    'epsilon_high': 4e-4,
  },
  'cispo': {'loss_type': 'cispo', 'epsilon_high': 5.0},
  'off_policy': {
    'loss_type': 'grpo',
    'off_policy_mask_threshold': 0.05,
    'beta': 0.04,
  },
}


def arrays():
  """The inputs of all cases; every second answer is far off its old policy."""
  rng = np.random.default_rng(0)
  shape = ROWS, LONGEST
  counts = rng.integers(1, LONGEST + 1, ROWS)
  old = -rng.exponential(1.0, shape)
  wide = np.where(np.arange(ROWS)[:, None] % 2, 0.5, 0.05)
  return {
    'counts': counts,
    'mask': (np.arange(LONGEST) < counts[:, None]).astype(np.int64),
    'old': old,
    'log_probs': old + wide * rng.normal(size=shape),
    'reference': old + 0.3 * rng.normal(size=shape),
    'advantages': rng.normal(size=ROWS),
    'rewards': rng.choice([0.0, 0.5, 1.0], (4, 8)),
  }


def main():
  """Runs every case in float64 and writes one file."""
  import torch
  from trl import GRPOTrainer

  inputs = arrays()
  tensor = {k: torch.tensor(v) for k, v in inputs.items()}
  out = dict(inputs)
  for name, case in CASES.items():
    log_probs = tensor['log_probs'].clone().requires_grad_()
    trainer = _trainer(torch, GRPOTrainer, log_probs, case)
    batch = {
      'prompt_ids': torch.zeros(ROWS, 1, dtype=torch.long),
      'prompt_mask': torch.ones(ROWS, 1, dtype=torch.long),
      'completion_ids': torch.zeros(ROWS, LONGEST, dtype=torch.long),
      'completion_mask': tensor['mask'],
      'advantages': tensor['advantages'],
      'old_per_token_logps': tensor['old'],
      'ref_per_token_logps': tensor['reference'],
      'num_items_in_batch': tensor['mask'].sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    loss.backward()
    out[f'{name}_loss'] = loss.detach().numpy()
    out[f'{name}_grad'] = log_probs.grad.numpy()
  rewards = tensor['rewards']
  spread = rewards.std(dim=1, keepdim=True)
  centred = rewards - rewards.mean(dim=1, keepdim=True)
  out['trl_advantages'] = (centred / (spread + 1e-4)).numpy()
  GOLDEN.parent.mkdir(exist_ok=True)
  np.savez_compressed(GOLDEN, **out)


def _trainer(torch, trainer_class, log_probs, case):
  """A trainer's fields that the loss reads, without a model."""
  beta = case.get('beta', 0.0)
  low = case.get('epsilon_low', 0.2)
  trainer = types.SimpleNamespace(
    aux_loss_enabled=False,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=case.get('off_policy_mask_threshold'),
    importance_sampling_level=case.get('importance_sampling_level', 'token'),
    beta=beta,
    args=types.SimpleNamespace(
      use_bias_correction_kl=case.get('use_bias_correction_kl', True),
      delta=None,
      steps_per_generation=1,
    ),
    loss_type=case['loss_type'],
    epsilon_low=low,
    epsilon_high=case.get('epsilon_high', low),
    use_vllm=False,
    model=types.SimpleNamespace(training=False),
    max_completion_length=LONGEST,
    current_gradient_accumulation_steps=1,
    accelerator=types.SimpleNamespace(
      num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
    ),
    _entropy_bonus_enabled=False,
    use_adaptive_entropy=False,
    _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    get_off_policy_mask=trainer_class.get_off_policy_mask,
  )
  entropies = torch.zeros_like(log_probs)
  trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
    log_probs,
    entropies,
    None,
  )
  return trainer


if __name__ == '__main__':
  main()
