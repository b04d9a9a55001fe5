"""Optimizers, learning rates, and how weights are stepped.

foreign: states of other programs' optimizers, numbered as here
lr_schedule: the learning rate over the run
muon: Muon for matrices, AdamW for all other weights
optimizer: make the optimizer by name; store, restore its state
stepping: step weights after or inside backward passes
"""
