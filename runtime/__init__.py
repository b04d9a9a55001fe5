"""How a loaded network is run: compiled, block by block, within the available memory.

compile: torch.compile for blocks, applied from outside
doctor: tell what is installed, and what is missing
machine: describe the machine for others, without names and paths
network_setup: put features around a loaded transformer, in order
kv_cache: keys and values that attention keeps between calls
offload/: keep parts in host memory, recompute activations
options: memory and speed, of trainings and of generations
planning/: the memory of a run, predicted before it starts
run_blocks: the one loop over blocks, the DiTs' base
step_cache: rules decide which passes to skip; a runner skips
ways/: splitting and sharing among processes, a file each
"""
