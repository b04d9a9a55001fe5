"""MiniMax-H3 as data: dimensions of its transformer, names inside it."""

from dataclasses import dataclass, replace

from minimax_h3.options import CLIP, LAST_FRAMES
from protocols.data import LatentSpec
from protocols.family import DitSpec, NoiseSpec, count_image_tokens
from protocols.few_steps import GUIDED, FewSteps, KeepingTarget
from protocols.rules import ModelRelease

PATCH = 2  # latent pixels along each side of a token
# modalities of tokens, as indices of their modulation
IMAGE, TEXT, AUDIO = range(3)
NUM_MODALITIES = 3


@dataclass(frozen=True)
class H3Config:
    """Dimensions of an H3 transformer, read from a checkpoint's tensors."""

    dim: int = 5376
    num_heads: int = 56
    head_width: int = 128
    ffn_dim: int = 14336
    num_layers: int = 50
    refiner_layers: int = 2
    channels: int = 24  # latent channels of images
    audio_channels: int = 32
    text_dim: int = 5120
    freq_dim: int = 256
    time_hidden: int = 5376
    time_dim: int = 2688
    table_rows: int = 0  # rows of a pruned file's table of time embeddings; 0 if embeddings are computed
    frequencies: int = 16  # rotary frequencies on each axis
    rope_theta: float = 10000.0
    eps: float = 1e-5

    kind = "t2va"

    @property
    def inner_dim(self) -> int:
        """Return the width of all attention heads together, which differs from the tokens' width."""
        return self.num_heads * self.head_width


# Source: musubi-tuner's page, which has no recipe of plain training
FEW_STEPS = FewSteps(
    base="",
    adapter="the file of ostris/minimax_h3_training_adapter",
    targets=(
        GUIDED,
        KeepingTarget(
            "learn what the model itself makes of a clip's first and last frame (write --teacher_conditions "
            "first,last behind the caching of texts, --task fl2va behind that of latents)",
            "--h3_teacher_matching --h3_teacher_loss_dc_weight 0.3 --h3_timestep_focus_prob 0.5",
        ),
    ),
    distillation_clause="has guidance distilled into it",
    unlearned_pronoun="it",
    consequence="clips need guidance, which a generation does not give",
    applies_to_all_files=True,
)
IMAGE_SHIFT = 12.0  # shift of the noise levels of images
AUDIO_SHIFT = 3.0
NOISE = NoiseSpec(
    training_offset=0.0,
    output_sign=-1.0,
    count_tokens=count_image_tokens,
    audio_shift=AUDIO_SHIFT / IMAGE_SHIFT,
    base_shift=IMAGE_SHIFT,
)
LATENT = LatentSpec(
    channels=24,
    stride=(4, 16, 16),
    pixel_step=32,
    frame_step=4,
    clip_frames=CLIP,
    tail_frames=LAST_FRAMES,
    caches_audio=True,
)
RELEASE = ModelRelease(
    ("MiniMaxAI/MiniMax-H3",),
    "MiniMax H3 Community License",
    "other",
    "https://huggingface.co/MiniMaxAI/MiniMax-H3/blob/main/LICENSE",
)
DIT = DitSpec(
    block_lists=("blocks",),
    fp8_exclude=("norm", "adaln_proj"),
    # published int8 files quantize the modulation too, which is a third of the weights
    form_exclude={"int8": ("norm",)},
    lora_exclude=("adaln_proj",),
    input_layers=("video_patch_proj", "audio_patch_proj", "condition_proj", "token_refiner"),
    token_wise_methods=("feed_forward",),
    modulated_input="modulated_input",
    num_unswapped=2,
    keep_float32=(
        "video_patch_proj.",
        "audio_patch_proj.",
        "time_embedder.",
        "adaln_t_table",
        "final_layer.video_out.",
        "final_layer.audio_out.",
    ),
)
# pruned files: their modulation has few columns and stays in 16 bits
PRUNED_DIT = replace(DIT, form_exclude={})


def choose_spec(config: H3Config) -> DitSpec:
    """Return the names of modules inside the transformer; files with pruned weights use other names."""
    return PRUNED_DIT if config.table_rows else DIT
