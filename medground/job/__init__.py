"""What keeps a job of several ranks together, and says what is wrong with it."""
