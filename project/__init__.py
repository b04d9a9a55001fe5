"""From a folder of clips or pictures to a trained LoRA: the files that describe it, and its commands.

files: looks at the folder, writes its three files
options: options of new_project.py and run_project.py
running: runs the commands of a described folder
"""
