"""Models and states on disk and on the hub.

files: names and times of saves, what is removed
hub: upload to the Hugging Face hub; the model card
options: options of saving, and the state to continue
split_model: a whole model in parts: training, files, states
states: write, find, check and read a run's state
"""
