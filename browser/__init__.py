"""The web pages: set up, start and watch training runs, generate, and manage models, datasets and a queue.

background_jobs: commands for a page, next to the queue
bin_folder: what pages have removed, until it is emptied
caption_keys: labels of the keys in JSON captions
captioning: captioning with a model, and trials on a few files
captions: write caption files, undo saves, never overwrite changes of others
check_lines: forms of lines of checks and of model files
checklist: findings about a folder, each with a fix
command_lines: a command as it can be typed in any folder
command_output: printed lines, the files that they name, and fixes
compare: find samples and clips of selected files, plan missing ones
compare_pages: page of comparisons, jobs for missing clips
dataset_keys: batch size, and options that dataset.toml replaces
dataset_pages: routes for datasets: files, thumbnails, edited captions
datasets: find datasets, measure them in another process
described_folder: read the files that `new` writes, and change their keys
draft_changes: show, check and save changes to these files
form_drafts: what is typed into the Generate form, in files
dropped_settings: how a dropped file was generated, as form values
durations: how long steps take, as earlier runs have measured
earlier_jobs: files that earlier jobs may still create
folder_files: rows of a folder, captions, excluded files
folder_settings: run.toml as a table of all its options
folder_tools: try, start, stop and resume tools on a folder
folders: folders below the roots that contain media
generate_pages: routes of the Generate page: form, render jobs, dropped files
hub_login: whether there is a Hugging Face token
idle_settings: settings without effect because of other settings
dropped_files: store dropped images and clips, typed by their content
jobs: command lines in a text file, run one after another
known_queues: which jobs of a queue the user knows
language_tables: translation tables, and the script with a language's strings
launch: start and stop the program of a command line
lora_rows: LoRAs of runs that a model can use
machine_status: status line of each page: processes, GPUs, free disk space
mask_making: form that generates masks for a folder
mask_pages: the Masks page: keys, brush, images
mask_review: masks over images; accept, invert, remove, draw, undo
mask_use: whether training runs use masks, in dataset.toml
memory_plan: memory plan of a training run, and its options
model_files: released files on disk, the models that use them, downloads
model_pages: the Models page: download after licenses, remove
model_table: models by output, download size and memory
short_names: digests as names, unused names
new_form: fields of the New page, and their command
new_pages: the New page: `new`, check and start by buttons
new_steps: progress of a folder, and its next step
offered_folders: media folders for which pages offer tools
options: options of run_browser.py: folders, host, token
page_access: path and cookie of an admitted browser
page_language: the language of each request, kept in a cookie
page_root: secret root path of the pages, known to admitted browsers
permissions: what a run.toml permits its run
printed_lines: known lines of `new` in the page's language
qr_code: a text as a QR code, for terminal and page
queue_pages: the Queue page and its buttons
recipes: from a form to a command line and a request
render_queue: render jobs in files that servers share
render_worker: generate results with a model that stays loaded
responses: pages, JSON and errors; bodies and forms of requests
result_pages: all results on the Generate page, their buttons
result_settings: settings in a result, and how to generate it again
results: find generated results, newest first
run_buttons: the buttons of a run and what they do
run_samples: prompts of a run as rows or as text
run_start: state of a run since its draft; starts it
run_views: pages, curves and files of one run
runs: find runs by their histories, and summarize each
sample_sizes: sample sizes that a model cannot generate
samples: rows of prompts.txt, and how often to sample
score_jobs: the job that scores samples of a run
server: routes, and the checks of each request
sessions: limits of the Generate page's process
setting_words: other programs' names for training settings
settings_page: the Settings page: folders, server, queue, bin
shared_files: send files of a shared run without their metadata
shares: share a run with a friend by a link
server_state: what all pages of a server share, its options
serving: serve pages or export one; print the URL
state_names: states of runs and jobs as text
static_files: scripts and style sheets, named with their digests
tag_editor: count tags in all captions, rename one, undo
tag_pages: a tagger for a folder, and renaming tags
tokens: the secret token of the page, and who opens it
tool_form: fields that become options of a tool
upload_parts: receive a large file in pieces
upload_stream: write the bytes of an upload as they arrive
uploads: receive dropped files, typed by their content
"""
