"""What a run on N GPUs takes, before anybody rents them: memory by a dry run, seconds by counting (docs/plan.md)."""
