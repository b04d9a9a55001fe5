"""The page: set up, start and watch trainings, generate, models, datasets and a queue, as files and commands.

background_jobs: commands for a page, next to the queue
bin_folder: what pages have removed, until it is emptied
caption_keys: form of the keys of captions in JSON
captioning: a model writes captions; a try on a few
captions: write caption files, undo, refuse to overwrite others
check_lines: forms of lines of checks and of model files
checklist: rows of a folder, each with its remedy
command_lines: a command as it can be typed in any folder
command_output: printed lines, with their files and a remedy
compare: find samples and clips of chosen files, plan the rest
compare_pages: page of comparisons, jobs for missing clips
dataset_keys: images of a step, options that dataset.toml replaces
dataset_pages: routes for datasets: files, small images, edited captions
datasets: find datasets, measure them in another process
described_folder: read a described folder, and change its keys
draft_changes: show, check and save changes of a described folder
form_drafts: what is typed into the form Generate, in files
dropped_settings: how a dropped file was made, as a form
durations: how long steps take, as earlier runs measured
earlier_jobs: what jobs before a command may still make
folder_files: rows of a folder, captions, files left out
folder_settings: run.toml as a table of all its options
folder_tools: try, start, stop and continue tools on a folder
folders: folders below the roots that hold media
generate_pages: routes of Generate: form, results to make, dropped files
hub_login: whether there is a token, without its text
idle_settings: settings without effect because of other settings
dropped_files: take dropped images and clips, judged by content
jobs: command lines of a text file, run one after another
known_queues: which jobs of a queue its user knows
launch: a line to a program; its processes started, interrupted, outlasted
lora_rows: LoRAs of runs that a model can take
machine_status: line of each page: what runs, cards, free disk
mask_making: form that has masks made for a folder
mask_pages: page of masks: keys, brush, images
mask_review: masks over images; accept, invert, remove, draw, undo
mask_use: whether a training learns by masks, in dataset.toml
memory_plan: plan of a training as a bar, its switches
model_files: released files on disk, what uses them, downloads
model_pages: page of models: loading after licenses, removing
model_table: models by what they make, load and fit
short_names: digests as names, names that nothing has
new_form: fields of the New page, and their command
new_pages: describe, check and start a folder by buttons
new_steps: how far a folder is, and its next step
offered_folders: folders with media that tools are offered for
options: options of run_browser.py: folders, address, token
page_access: path and cookie of a let-in browser
page_language: tables of languages, one chosen for each request
page_root: addresses below the path that let-in browsers know
permissions: what a run.toml lets its run do
printed_lines: usual lines of `new` in a page's language
qr_code: a text as QR code, for terminal and page
queue_pages: page of the queue, its buttons
recipes: a form to a command line and a request
render_queue: results to make, in files that servers share
render_worker: make results with a model that stays loaded
responses: pages, JSON, refusals; bodies and forms of requests
result_pages: results of Generate part by part, their buttons
result_settings: settings in a result, and how it is made again
results: find results of all days, remove them
run_buttons: the buttons of a run and what they do
run_samples: prompts of a run as rows or as text
run_start: state of a run from its draft on, its start
run_views: pages, curves and files of one run
runs: find runs by their histories, tell each at a summary
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
