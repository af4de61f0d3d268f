"""Reinforcement learning: advantages, packed answers, GRPO's objective."""
