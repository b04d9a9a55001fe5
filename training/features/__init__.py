"""Features of training, each in one file that can be deleted together with its lines below.

adapter: train a training adapter
base_weights: merge LoRAs into the transformers before training
blank_prior: keep the base model's prediction for the empty prompt
composing: options of all features; active features join a run
contract: what a feature is, and how to write one
early_stopping: end when the validation loss no longer falls
ema: keep an average of the trained weights
ema_weights: compute this average of the weights
embedding: train embedding vectors of a new word
embedding_rows: these vectors and their parameter group
encoded_captions: captions that are encoded before the network loads
guided: target away from the prediction for the empty prompt
hooks: what features add to and read of a run
inpainting: train an inpainting model
ip_noise: add noise to the input that is not predicted
item_losses: record the loss of each image and clip
item_losses_recording: write these losses without waiting for the device
leco: learn from prompts alone
leco_file: read a file of such prompts
leco_options: options of LECO's scripts
leco_passes: latents and passes of LECO
mask_prior: keep the base model's prediction outside of masks
on_end: start a command when the run is over
output_preservation: keep the base model's prediction for some tables
preference: learn from pairs of a preferred and a rejected item
preference_pairs: the loss of such pairs
score_samples: score samples while the run trains
score_samples_starting: the process that scores them
show_timesteps: show the distribution of timesteps
show_timesteps_drawing: count and draw timesteps
skip: skip steps with a bad loss
slider: slide between the captions of a file
slider_file: read a file of captions to slide between
slider_passes: the passes of a slider
step_targets: additional targets, and their passes
teacher: learn from a frozen model
teacher_balance: correct the teacher's loss for --timestep_focus
teacher_errors: compare magnitude and direction of two predictions
teacher_model: another frozen model as a teacher, with its LoRAs
teacher_options: options of the teacher
teacher_passes: compare with the teacher inside and outside of its band
tread: let tokens bypass the middle blocks
tread_routes: draw the tokens that bypass the middle blocks
tread_runner: run the blocks of such a pass
trackers: send values and samples to TensorBoard, wandb and others
trackers_options: options of trackers, and their checks
trackers_sending: send values through the trackers of accelerate
uploads: upload saved files to the Hugging Face hub
uploads_hub: the client of the hub, and the model card
uploads_options: options of uploads and downloads
workflow: write a workflow for ComfyUI next to each LoRA
workflow_nodes: the nodes of such a workflow
"""

import os

from modules.installation import EXTENSIONS
from training.features.adapter import ADAPTER
from training.features.base_weights import BASE_WEIGHTS
from training.features.blank_prior import BLANK_PRIOR
from training.features.contract import Feature
from training.features.early_stopping import EARLY_STOPPING
from training.features.ema import EMA
from training.features.embedding import EMBEDDING
from training.features.guided import GUIDED
from training.features.inpainting import INPAINTING
from training.features.ip_noise import IP_NOISE
from training.features.item_losses import ITEM_LOSSES
from training.features.leco import LECO
from training.features.mask_prior import MASK_PRIOR
from training.features.on_end import ON_END
from training.features.output_preservation import OUTPUT_PRESERVATION
from training.features.preference import PREFERENCE
from training.features.score_samples import SCORE_SAMPLES
from training.features.show_timesteps import SHOW_TIMESTEPS
from training.features.skip import SKIP
from training.features.slider import SLIDER
from training.features.teacher import TEACHER
from training.features.trackers import TRACKERS
from training.features.tread import TREAD
from training.features.uploads import UPLOADS
from training.features.workflow import WORKFLOW

# in the order in which they act, one per line
# fmt: off
FEATURES: tuple[Feature, ...] = (
    BASE_WEIGHTS,
    EMBEDDING,
    SHOW_TIMESTEPS,
    INPAINTING,
    IP_NOISE,
    OUTPUT_PRESERVATION,
    GUIDED,
    TEACHER,
    MASK_PRIOR,
    BLANK_PRIOR,
    SLIDER,
    LECO,
    PREFERENCE,
    ADAPTER,
    TREAD,
    EMA,
    SKIP,
    EARLY_STOPPING,
    ITEM_LOSSES,
    SCORE_SAMPLES,
    TRACKERS,
    ON_END,
    UPLOADS,
    WORKFLOW,
)
# fmt: on
if os.environ.get(EXTENSIONS):
    from modules.extensions import FEATURES as GROUP
    from modules.extensions import load_extensions

    FEATURES = (*FEATURES, *load_extensions(GROUP).values())
