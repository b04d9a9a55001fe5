"""Optimizers, learning rates, and how weights are stepped.

foreign: states of other programs' optimizers, numbered as here
lr_schedule: the learning rate over the run
optimizer: make the optimizer by name; store, restore its state
stepping: step weights after or inside backward passes
"""
