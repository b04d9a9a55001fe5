"""From options to saved files: training; read run.py first, then loop.py.

adapted: warnings about runs with --training_adapter
bad_steps: the error for a NaN or infinite loss
caching_inside: caches made by the training command itself
checks: check options and headers before gigabytes are loaded
config_options: --config_file: options from a TOML file
data/: batches, noise and timesteps, prepared before they are needed
edited_prompts: sample prompts that are edited during the training
experts: prepare the transformers of a run, which may be several
features/: optional features of a run, each in one file
next_commands: command lines that can follow a training
image_metadata: additional metadata of image trainers
image_options: compose the options of image trainers
kohya_page: keys in --config_file that no training script declares
learner: what a run trains: LoRA, family's network, or model
learning: load networks, make optimizer, put the run together
learning_options: options of the trained part, its optimizer and rate
loop: batches, loss, gradients, steps; then log, sample, save
loss: flow matching: add noise, predict velocity, compare
metadata: metadata of saved files
noise_options: options of noise levels, loss and weighting
optimizers/: optimizers, learning rates, and how weights are stepped
options: compose the options of training in every family
other_models: models of a run in addition to the trained one
plan: find all parts of a run before loading
planning/: the memory of a training run
previews: show what a run would do, without training
processes: join processes, sum gradients, find a lost one
reports/: what a run reports: logs, numbers, slow steps
resuming: find a state to continue from, compare settings
run: build a run from options, then start the loop
run_end: start a command when a run is over
run_options: options of data, length, samples, logs, processes
samples: samples during training, with the loops of generation
saver: save files with metadata and states; restore a state
saving/: models and states on disk
scoring/: score samples by prompts and training images
scripts: make the training scripts of a family
steps: which micro-batches form which optimizer step
summary: boxes of a run: plan and result
targets/: passes of a step, and targets of their predictions
trainable: the trained part: a LoRA, or the DiT
training_run: the record that the training loop works with
unused_options: options without effect in combination with others
validation: loss of held-out items at fixed noise
token_captions: check that captions contain the word to learn
whole_checkpoint: train all weights of a model, also text encoders
"""
