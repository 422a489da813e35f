"""Audit of a data folder: what is wrong, what is suspicious, and how far a guess gets that never sees an image."""
