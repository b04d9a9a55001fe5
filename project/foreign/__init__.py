"""Projects of other trainers, which `new --from` reads.

contract: a program's record, readers of values
rules: what keys mean that several trainers have
reading: recognizes a file, takes values or says why not
settling: what becomes of values for a model and script
counting: counts the steps of an epoch, as the training will
checking: checks the run as `run` does
ai_toolkit: AI Toolkit's YAML files of a job
diffusion_pipe: diffusion-pipe's TOML, and its file of data
kohya_gui: the JSON that the GUI of kohya_ss saves
onetrainer: OneTrainer's JSON, and its list of concepts
simpletuner: SimpleTuner's config.json, and its data backends
"""
