"""Commands that belong to no model.

caption_dataset: writes captions with a vision-language model, or edits them
compare: makes a grid of clips, a column per LoRA
convert_cache: turns the caches of a dataset into another form
dataset_report: writes a page about a dataset
doctor: tells what the environment has, and what each missing thing costs
download: downloads the released files that a task needs
run_browser: shows all runs of some folders while they train
split_video: cuts footage into clips at its scenes
"""
