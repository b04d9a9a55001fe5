"""Projects of other trainers, which `new --from` reads.

contract: a program's record, readers of values
rules: what keys mean that several trainers have
reading: recognizes a file, reads its keys by their rules
own_files: base model, other networks, LoRA to start from
project: what a file asks for, what is told of it
taking: takes a value by its rule, or says why not
naming: the model that the keys name
places: datasets of a list, and the described folders
sample_prompts: samples as lines of prompts.txt, in our syntax
settling: what becomes of values for a model and script
learning: which networks learn, at which rates
optimizing: the optimizer, and the arguments it has here
named: keys that the script knows by the same name
lengths: steps, epochs as steps, warm-up
counting: counts the steps of an epoch, as the training will
checking: checks the run as `run` does
ai_toolkit: AI Toolkit's YAML files of a job
diffusion_pipe: diffusion-pipe's TOML, and its file of data
kohya_gui: the JSON that the GUI of kohya_ss saves
ltx_trainer: ltx-trainer's YAML, with its conditions
onetrainer: OneTrainer's JSON, and its list of concepts
simpletuner: SimpleTuner's config.json, and its data backends
"""
