"""Data sets: records and images of every source in one form, checked before use."""
