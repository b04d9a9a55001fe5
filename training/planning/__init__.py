"""The memory of a training run.

memory: predict the memory of a step, advise what fits
rehearsal: rehearse a training step on tensors without content
several_cards: the ways in which several cards train
"""
