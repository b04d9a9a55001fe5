"""The memory of a run, predicted before it starts.

device_memory: measure a CUDA device's memory and its peak
division: what a card holds that shares a step with others
dry_run: run real code without data, count bytes
kernels: stand-ins for fused kernels in a dry run
memory_plan: peaks of memory by part, as a table
several_cards: compare the ways to use several cards
"""
