"""Prompt -> completions."""
