"""Projects of other trainers, which `new --from` reads.

contract: a program's record, readers of values
rules: what keys mean that several trainers have
reading: recognises a file, says what becomes of each key
ai_toolkit: AI Toolkit's YAML files of a job
diffusion_pipe: diffusion-pipe's TOML, and its file of data
kohya_gui: the JSON that the GUI of kohya_ss saves
onetrainer: OneTrainer's JSON, and its list of concepts
simpletuner: SimpleTuner's config.json, and its data backends
"""
