"""From a folder of clips or images to a trained LoRA: the files that describe it, and its commands.

model_sizes: sizes of models, and whether they fit a GPU
media: looks at the folder
control_pairs: recognizes pairs that a ControlNet would learn
listed_captions: reads captions from lists beside the files
tags: tells captions that are lists of tags
model_choice: spellings of models, the question asked, facts of families
own_samples: images that a model made itself, with their prompts
varied_captions: captions for these images, made by a grammar
own_commands: how to make these images
model_files: files of a model, released or named
describing: the text of the three files
kinds/: what runs train, as `new --train` names it
files: writes them, and tells what was found
file_check: checks one file of a model, for a page
checked: what a check has found good, for the run
known_folders: remembers which folders were described or read here
options: shared parts of the options below, names and checks
new_options: options of new_project.py alone
run_options: options of run_project.py and of its training
running: runs the commands of a described folder
on_end: starts the command of --on_end, says how a run ended
pack_options: options of tools/pack.py and tools/unpack.py
packing: makes one file of a described folder
relocating: replaces paths of this machine in a folder's texts
unpacking: makes a folder from a packed file again
script_facts: options of a script that trains, asked from the script
foreign/: projects of other trainers, which `new --from` reads
recipes/: values of a training run in a shareable file
tracing: keeps a trace of a run for the browser
"""
