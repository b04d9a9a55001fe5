"""Targets of a training: what the network's prediction is compared with, besides the clip itself."""
