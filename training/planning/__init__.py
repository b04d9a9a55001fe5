"""The memory of a training run.

memory: rehearse a step of the largest batch
prediction: predict the memory of a step without data
rehearsal: rehearse a training step on tensors without content
"""
