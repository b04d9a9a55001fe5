"""Models and states on disk."""
