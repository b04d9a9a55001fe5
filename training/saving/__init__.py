"""Models and states on disk and on the hub."""
