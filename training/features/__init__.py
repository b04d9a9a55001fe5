"""Features of training, each in one file that can be deleted together with its lines below."""

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
from training.features.item_turns import ITEM_TURNS
from training.features.leco import LECO
from training.features.mask_prior import MASK_PRIOR
from training.features.on_end import ON_END
from training.features.output_preservation import OUTPUT_PRESERVATION
from training.features.preference import PREFERENCE
from training.features.rollback import ROLLBACK
from training.features.sample_variants import SAMPLE_VARIANTS
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
    ROLLBACK,
    EARLY_STOPPING,
    ITEM_LOSSES,
    ITEM_TURNS,
    SAMPLE_VARIANTS,
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
