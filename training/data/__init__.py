"""Batches, noise and timesteps, ahead of need."""
