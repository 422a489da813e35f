"""Reinforcement learning that teaches vision-language models to ground medical phrases."""

__version__ = "0.1.0"
