"""Fit a network into device memory: parts in host memory or other processes, recomputed activations.

block_swap: copy blocks from host memory before they run
checkpointing: gradient checkpointing, of blocks and pieces of tokens
context: lay out processes, exchange tokens of a clip
host_memory: pinned and shared memory, copies, loaded networks
joining: processes of a launcher, which agree on values
sharding: split blocks over processes by FSDP
swap_plan: choose which weights stay in host memory
turns: networks take turns on a device
"""
