"""Batches, noise and timesteps, prepared before they are needed.

feed: prepare micro-batches early, in workers if any
live_media: pictures encoded while training, and other sources
live_text: texts encoded while training
timesteps: draw timesteps, and weight losses
"""
