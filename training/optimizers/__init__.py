"""Optimizers, learning rates, and how weights are stepped.

lr_schedule: the learning rate over the run
optimizer: make the optimizer from a name or path
state: store and restore an optimizer's state exactly
stepping: step weights after or inside backward passes
"""
