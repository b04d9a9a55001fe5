"""Batches, noise and timesteps, prepared before they are needed."""
