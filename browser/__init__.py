"""Pages for all runs: a server that reads their files, and writes only a queue of command lines and captions.

answers: pages, JSON, refusals; bodies and forms of requests
captioning: a model writes captions; a try on a few
captions: write caption files, undo, refuse to overwrite others
compare: find samples and clips of chosen files, plan the rest
dataset_pages: routes for datasets: files, small pictures, edited captions
datasets: find datasets, measure them in another process
described: read a described folder, and change its keys
errands: commands for a page, next to the queue
folder_files: rows of a folder, captions, files left out
folders: folders below the roots that hold media
jobs: command lines of a text file, run one after another
launch: a line to a program; its processes started, interrupted, outlasted
model_table: models by what they make, load and fit
new_form: fields of the page New, and their command
new_pages: describe, check and start a folder by buttons
options: options of run_browser.py: folders, address, token
queue_views: pages of queue and comparison, their buttons
runs: find runs by their histories, tell each at a glance
said: printed lines, with their files and a remedy
server: routes, and what a request must have to pass
site: what all pages of one server share
start: serve pages or export one; show the address
uploads: take dropped files, judged by their content
views: pages, curves and files of one run
"""
