"""What all rooms share: files, media, layers, options, devices.

atomic_write: write to a temporary name, then rename
attention/: attention: one function over a table of back ends
backups: copy a file to NAME.bak before it changes
bars: progress bars of one look
card_builds: choose the build of torch for this machine's card
chat_templates: render a model's chat template within bounds
command: what every script shares: logging, clean error output, exit codes
compile_options: options for compiling the blocks of the transformer with torch
compiler_errors: the cause and the remedy of a failed compilation
console: show a summary as a box; silence the log
console_options: options of log lines: how many, and where they go
control_codes: text for a console
devices: choose devices, name dtypes, send tensors, free and measure memory
downloading: receive a file from a site, continued and bounded
early_errors: Ctrl-C and broken extensions while modules are imported
environment: the virtual environment of the scripts that set up
error_output: the message in what a program of ours has printed
errors: errors that a user can correct
extension_words: the extensions that are on, in a command
extensions: load what installed packages bring, if it is named
file_batches: write many small files in the time of few
file_locks: locks on open files that end with their process
flow/: noise schedules and the solvers that follow them
help_text: what -h and --help print of a parser's options
installation: checkout or package, imports by name
installed: find modules of installed packages, importing none
integers: divide and round whole numbers upwards
interpreter: refuse a Python that cannot run Reelsmith; answer from tables
layers/: small layers and rules that several models share
limits: limits on files and answers from outside
line_kinds: what a printed line is about, for the browser
lost_processes: notice that another process of a run died or stopped
media/: images and videos on disk, and their pixels
minimal_options: options that the minimal inference scripts share
memory_limit: bound a process that runs a stranger's file
mistyped: name our option for another program's
nvidia_driver: cards of NVIDIA, and why torch does not see them
onnx_models: run ONNX files in bounded memory and time
open_files: replace files that another program has open, on Windows
option_checks: check values by limits, relations and places
option_tables: read the options of every script from compiled tables
option_values: values of options: converted from what was typed, and checked
options: declare options as fields of a record
output_files: check output names, ask about existing files
pages/: HTML pages of runs, datasets and comparisons
parser: argparse from records, and answers to mistakes
paths: paths and addresses as users write them
progress: how far a program is, in a file
private_torch: everything private of torch that is used
repeated_options: repeat one command's options in the next one
run_limits: where `run` may write, and what it sends
screen: whether this machine has a screen to look at
script_options: read the running script's options, by table or records
script_words: words of the command that name a script
seeds: seeds for independent random streams, derived from names and numbers
speed_options: options of attention, fp8, VAE, text encoders
table_answers: parse the command line by tables; answer help and errors
table_parser: build a parser from a table, and describe one
template_process: the program that renders one chat template
text_encodings: guess the encoding of a file not in UTF-8
text_files: text files that a user names, read safely
typed_command: commands that are values of options: their words
user_files: small files for this user, outside of their folders
varints: read whole numbers of varying length
version: the version of Reelsmith
yaml_files: YAML texts of somebody else, bounded
zip_files: read a stranger's zip file's list, bounded
"""
