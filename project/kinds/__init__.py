"""Kinds of runs that `new --train` names.

adapter: a run that makes a training adapter
contract: how the run of a kind differs from a LoRA's
composing: the kinds, one line for each
whole_model: a run that trains the model itself
control_networks: runs of ControlNet-LLLite and ControlNet
embedding: a run that trains a word
"""
