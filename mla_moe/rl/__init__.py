"""Reinforcement learning: tasks, rewards, advantages, and GRPO's objective."""
