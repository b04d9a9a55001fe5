"""Pages for all runs: a server that reads their files, and writes only a queue of command lines and captions.

answers: pages, JSON, refusals; bodies and forms of requests
captions: write caption files, undo, refuse to overwrite others
compare: find samples and clips of chosen files, plan the rest
dataset_pages: routes for datasets: files, small pictures, edited captions
datasets: find datasets, measure them in another process
drafts: what is typed into the form Generate, in files
generate_pages: routes of Generate: form, wishes, dropped files
inputs: take dropped pictures and clips, judged by content
jobs: command lines of a text file, run one after another
launch: a line to a program; its processes started, interrupted, outlasted
lora_rows: LoRAs of runs that a model can take
making: make wishes with a model that stays loaded
options: options of run_browser.py: folders, address, token
queue_views: pages of queue and comparison, their buttons
recipes: a form to a command line and a request
refilling: how a dropped file was made, as a form
runs: find runs by their histories, tell each at a glance
server: routes, and what a request must have to pass
start: serve pages or export one; show the address
views: pages, curves and files of one run
wishes: results to make, in files that servers share
"""
