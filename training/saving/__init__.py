"""Models and states on disk.

files: names and times of saves, what is removed
options: options of saving, and the state to continue
split_model: a whole model in parts: training, files, states
states: write, find, check and read a run's state
"""
