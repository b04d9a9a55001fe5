"""Ideogram 4 as data: dimensions of its transformer, its source, latents, noise, names of parts."""

from dataclasses import dataclass, replace

from flux_2 import configs as flux_2
from ideogram4.latent_statistics import DEVIATIONS, MEANS
from lumina.configs import LuminaConfig
from protocols.family import DitSpec, NoiseSpec
from protocols.rules import ModelRelease

RELEASE = ModelRelease(
    ("ideogram-ai/ideogram-4-fp8",),
    "Ideogram Non-Commercial Model Agreement",
    "other",
    "https://huggingface.co/ideogram-ai/ideogram-4-fp8/blob/main/LICENSE.md",
)
# layers of Qwen3-VL before each state that is read; the last one is the state before the final norm
STATES = (*range(1, 36, 3), 36)
# FLUX.2's autoencoder. Caches have its means as they are, packed in another order; each packed latent is a
# token
LATENT = replace(
    flux_2.LATENT,
    names_frames=True,
    shares_caches=False,
    channel_means=MEANS,
    channel_deviations=DEVIATIONS,
)
MAX_SECTION = 20  # frequencies of a head's rotary embedding that rows get, and columns
SECOND = "unconditional"  # attribute of the network that predicts without a text


@dataclass(frozen=True)
class Ideogram4Config(LuminaConfig):
    """Dimensions of an Ideogram 4 transformer, read from a checkpoint's tensors.

    `text_dim` is the width of the language model's states side by side, `time_dim` that of what modulates the
    blocks. `patch_size` counts packed latents.
    """

    patch_size: int = 1
    rope_theta: float = 5e6

    @property
    def section(self) -> int:
        """Return how many frequencies encode the row, and how many the column; all others encode the time."""
        return min(MAX_SECTION, self.head_width // 6)


# `output_sign`: the network predicts the image less the noise
NOISE = NoiseSpec(training_offset=0.0, output_sign=-1.0, count_tokens=flux_2.count_latents)
DIT = DitSpec(
    block_lists=("layers",),
    num_fused_matrices={".attention.qkv": 3},
    shared_inputs=(("feed_forward.w1", "feed_forward.w3"),),
    lora_exclude=(".adaln_modulation",),
    fp8_exclude=("norm", "adaln_modulation"),
    input_layers=("input_proj", "llm_cond_proj"),
    token_wise_methods=("feed",),
    modulated_input="modulated_input",
    # it computes in float32; under 1 % of the model
    keep_float32=("t_embedding.", "adaln_proj."),
)
# the same with the second network beside the first; its blocks get no LoRA
PAIR = replace(
    DIT,
    block_lists=("layers", f"{SECOND}.layers"),
    frozen_lists=(f"{SECOND}.layers",),
    swap_counts=lambda blocks: (blocks, blocks),
    keep_float32=(*DIT.keep_float32, *(f"{SECOND}.{start}" for start in DIT.keep_float32)),
)
