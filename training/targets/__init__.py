"""Targets of a training: what the network's prediction is compared with, besides the clip itself.

errors: size and direction of two predictions, compared apart
passes: of a step: those that make targets, those that learn
teachers: another frozen model as a teacher, with its LoRAs
"""
