"""Batches, noise and timesteps, prepared before they are needed.

feed: prepare micro-batches early, in workers if any
live: texts that are encoded while training
timesteps: draw timesteps, and weight losses
table_times: timesteps of each dataset table
"""
