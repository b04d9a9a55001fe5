"""Plan the memory of a training run.

memory: predict the memory of a step, advise on what fits
rehearsal: rehearse a training step on tensors without content
several_cards: compare ways to train on several cards
"""
