"""From options to saved files: training; read run.py first, then loop.py.

averages: the exponential moving average (EMA) of the trained weights
caching_inside: caches made by the training command itself
changes: go on from a state with changed settings
config_options: --config_file: options from a TOML file
data/: batches, noise and timesteps, prepared before they are needed
dressing: how the trained run's network is loaded
early_checks: check options and headers before gigabytes are loaded
experts: models with several transformers: which learns, which works
following: command lines that can follow a training
foreign_options: options of other trainers: refused, or answered
image_options: compose the options of image trainers
learner_options: options of the trained part
learning: load networks, make optimizer, put the run together
live_choice: which texts are encoded while training
loop: batches, loss, gradients, steps; then log, sample, save
loop_options: options of data, length, seed and validation
loss: flow matching: add noise, predict velocity, compare
loss_options: options of the loss and its weighting
metadata: metadata of saved files: `ss_*` and `modelspec.*`
optimizers/: optimizers, learning rates, and how weights are stepped
options: compose the options of training in every family
plan: find all parts of a run before loading
planning/: the memory of a training run
previews: show what a run would do, without training
processes/: processes and their precision
reports/: what a run reports: logs, numbers, slow steps
restoring: the state of a run, saved and put back
resuming: find a state to go on from, compare settings
run: build a run from options, give it to the loop
sample_options: options of the samples made while training
samples: samples while training, by the loops of generation
saver: save files, averages, states and the model card
saving/: models and states on disk and on the hub
scripts: make the training scripts of a family
steps: which micro-batches form which optimizer step
summary: boxes of a run: plan and result
trainable: the trained part: a LoRA, or the DiT
training_run: the record that the training loop works with
triggers: files that ask a run for samples or saves
unused_options: name given options without effect
validation: loss of held-out items at fixed noise
"""
