"""Features of training, each in one file that can be deleted together with its lines below.

adapter: make a LoRA that others are trained with
base_weights: merge LoRAs into the transformers before
blank_prior: hold the network to the model for the empty prompt
composing: options of all features; those that are on join
contract: what a feature is, and how one is written
early_stopping: end when the validation loss no longer falls
ema: keep an average of the trained weights
ema_weights: how this average is computed
embedding: learn the vectors of a new word too
embedding_rows: these vectors, next to the network
encoded_captions: captions that are encoded once, before
guided: learn away from what is predicted for the empty prompt
hooks: where features act in a run, and what they see
inpainting: train a model that repaints what a mask marks
ip_noise: mix in further noise, which is not to be predicted
item_losses: record the loss of each picture and clip
item_losses_recording: how, without waiting, with small pictures
leco: learn from prompts alone
leco_file: a file of such prompts
leco_options: which prompts, and how latents are made
leco_passes: their latents and passes
mask_prior: hold the network to the model outside masks
on_end: start a command when the run is over
output_preservation: let samples of some tables stay as they are
preference: learn from pairs of a better and a worse one
preference_pairs: the loss of such pairs
score_samples: score samples while the run trains
score_samples_starting: the process that scores them
show_timesteps: show which timesteps would be drawn
show_timesteps_drawing: count and draw them
skip: leave out steps that went wrong, and remember them
slider: slide between the captions of a file
slider_file: a file of captions to slide between
slider_passes: the passes of a slider
step_targets: targets besides the clip, and their passes
teacher: learn from a frozen model
teacher_balance: what makes up for a focus in the teacher's band
teacher_errors: size and direction of two predictions, compared apart
teacher_model: another frozen model as a teacher, with its LoRAs
teacher_options: which model teaches, and how it is compared
teacher_passes: the comparison with the teacher, in its band and outside
tread: let tokens pass by the middle blocks
tread_routes: which tokens pass by the middle blocks
tread_runner: the runner of such a pass
trackers: send numbers and samples to TensorBoard, wandb and others
trackers_options: which trackers get numbers, and whether they can
trackers_sending: what sends them through the trackers of accelerate
uploads: send what is saved to the Hugging Face hub
uploads_hub: the client of the hub, and the model card
uploads_options: what is uploaded, and whether a state is there
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

# in the order in which they act, one a line
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
