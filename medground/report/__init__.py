"""A run's folder -> one HTML page, and a picture for the README."""
