"""Reinforcement learning: questions, and rewards of the answers as text."""
