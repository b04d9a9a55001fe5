"""The page: set up, start and watch trainings, generate, models, datasets and a queue, as files and commands.

background_jobs: commands for a page, next to the queue
bin_folder: what pages have removed, until it is emptied
caption_keys: form of the keys of captions in JSON
captioning: write captions with a model; a trial on a few files
captions: write caption files, undo, never overwrite others' changes
check_lines: patterns of the lines that checks print
checklist: rows of a folder, each with its remedy
command_lines: format a command for use in any folder
command_output: printed lines, with their files and a remedy
compare: find samples and clips of chosen files, plan the rest
compare_pages: page of comparisons, jobs for missing clips
dataset_keys: images of a step, options that dataset.toml replaces
dataset_pages: routes for datasets: files, small images, edited captions
datasets: find datasets, measure them in another process
described_folder: read a described folder, and change its keys
draft_changes: show, check and save changes of a described folder
form_drafts: what is typed into the form Generate, in files
dropped_settings: fill a form with the settings of a dropped file
durations: estimate how long steps take, from earlier runs
earlier_jobs: files that jobs before a command may still create
folder_files: rows of a folder, captions, files left out
folder_settings: run.toml as a table of all its options
folder_tools: try, start, stop and continue tools on a folder
folders: folders below the roots that contain media
generate_pages: routes of Generate: form, results to make, dropped files
hub_login: whether there is a token, without its text
idle_settings: settings without effect because of other settings
dropped_files: accept dropped images and clips, checked by content
jobs: command lines of a text file, run one after another
known_queues: which jobs of a queue its user knows
launch: turn a line into a program; start and interrupt its processes
lora_rows: LoRAs of runs that a model can use
machine_status: status line of each page: processes, cards, free disk
mask_making: form that generates masks for a folder
mask_pages: page of masks: keys, brush, images
mask_review: masks over images; accept, invert, remove, draw, undo
mask_use: whether a training uses masks, in dataset.toml
memory_plan: plan of a training as a bar, its switches
model_files: released files on disk, their users, downloads
model_pages: page of models: loading after licenses, removing
model_table: table of models: outputs, downloads, memory
short_names: digests as names, unused names
new_form: fields of the page New, and their command
new_pages: buttons that describe, check and train on a folder
new_steps: how far a folder is, and its next step
offered_folders: media folders for which tools are offered
options: options of run_browser.py: folders, address, token
page_access: path and cookie of an admitted browser
page_language: tables of languages, one chosen for each request
page_root: addresses below the path that admitted browsers know
permissions: what a run.toml allows its run to do
printed_lines: usual lines of `new` in a page's language
qr_code: a text as QR code, for terminal and page
queue_pages: page of the queue, its buttons
recipes: convert a form into a command line and a request
render_queue: results to make, in files that servers share
render_worker: make results with a model that stays loaded
responses: pages, JSON, refusals; bodies and forms of requests
result_pages: results of Generate part by part, their buttons
result_settings: read the settings of a result, generate it again
results: find results of all days, remove them
run_buttons: the buttons of a run and what they do
run_samples: prompts of a run as rows or as text
run_start: state of a run, from draft to end; starting it
run_views: pages, curves and files of one run
runs: find runs by their histories, and summarize them
sample_sizes: sizes of samples that a model cannot make
samples: rows of prompts.txt, and how often they are made
score_jobs: the job that scores samples of a run
server: routes, and what a request must have to pass
sessions: what the process behind Generate may do
setting_words: words of other programs for settings of a training
settings_page: page of settings: folders, server, queue, bin
shared_files: send files of a shared run without their metadata
shares: share a run with a friend by a link
server_state: what all pages of one server share, how it started
serving: serve pages or export one; show the address
state_names: states of runs and jobs in words
tag_editor: count tags of all captions, rename one, undo
tag_pages: a tagger for a folder, tags renamed everywhere
tokens: the secret word of the page, and who opens it
tool_form: fields that become options of a tool
upload_parts: take a large file in pieces
upload_stream: write the bytes of a dropped file as they arrive
uploads: take dropped files, judged by their content
"""
