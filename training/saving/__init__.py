"""Models and states on disk and on the hub.

earlier: keep results of runs of one name apart
files: when and where to save, and what to remove
model_card: README.md of a repository for trained files
old_states: read states of before version 2
options: options of saving, and the state to continue
states: write, find, check and read a run's state
upload: upload to and download from the Hugging Face hub
"""
