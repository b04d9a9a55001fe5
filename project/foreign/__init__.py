"""Projects of other trainers, which `new --from` reads.

contract: a program's record, readers of values
rules: what keys mean that several trainers have
reading: recognises a file, takes its values or notes why they are left
settling: what becomes of the values for a model, a kind of run and a script
counting: counts the steps of an epoch, as the training will
checking: checks the run as `run` does
ai_toolkit: AI Toolkit's YAML files of a job
diffusion_pipe: diffusion-pipe's TOML, and its file of data
kohya_gui: the JSON that the GUI of kohya_ss saves
onetrainer: OneTrainer's JSON, and its list of concepts
simpletuner: SimpleTuner's config.json, and its data backends
"""
