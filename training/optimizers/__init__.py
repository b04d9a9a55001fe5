"""Optimizers, learning rates, and how weights are stepped.

finished_weights: use the network between two steps without changing the run
fused_backward: step weights after or inside backward passes
lr_schedule: the learning rate over the run
lr_schedule_options: options of the learning-rate schedule
optimizer: make the optimizer from a name or path
options: options of optimizer, its parts and the average
parameter_steps: step one parameter at a time, also in bf16
state: store and restore an optimizer's state exactly
"""
