"""What a completion earns: format, spatial, and their weighted sum."""
