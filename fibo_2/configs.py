"""Fibo 2.0 as data: dimensions of its transformer, states of its text, its source, noise, names of parts."""

from dataclasses import dataclass

from flux_2.configs import LATENT, count_latents
from lumina.configs import LuminaConfig
from protocols.family import DitSpec, NoiseSpec
from protocols.rules import ModelRelease

__all__ = ["LATENT"]  # the model shares FLUX.2's autoencoder; each packed latent is a token

RELEASE = ModelRelease(
    ("briaai/Fibo-2.0-dev", "briaai/Fibo-2.0-edit-turbo"),
    "CC BY-NC 4.0",
    "cc-by-nc-4.0",
    "https://creativecommons.org/licenses/by-nc/4.0/",
)
# layers of Qwen3-VL before the three states that are read side by side: first by the Perceiver, then by each
# block that reads the text
BUNDLES = ((9, 20, 31), (5, 16, 27), (7, 18, 29), (9, 20, 31), (11, 22, 33), (13, 24, 35))
STATES = tuple(sorted({layer for bundle in BUNDLES for layer in bundle}))  # each is cached once
STATES_PER_BUNDLE = len(BUNDLES[0])
# places in STATES of each bundle's
PLACES = tuple(tuple(STATES.index(layer) for layer in bundle) for bundle in BUNDLES)
MAX_INJECTIONS = len(BUNDLES) - 1
# limits of a text's length, between which the number of gist tokens grows
MIN_TOKENS, MAX_TOKENS = 256, 2048
GIST_STEPS = 8  # the number of gist tokens is a multiple of an eighth of the most


@dataclass(frozen=True)
class Fibo2Config(LuminaConfig):
    """Dimensions of a Fibo 2.0 transformer, read from a checkpoint's tensors."""

    time_hidden: int = 1024  # width between the layers that embed the time
    max_gist: int = 512  # maximum number of tokens that the Perceiver makes from a text
    perceiver_layers: int = 2
    injections: tuple[int, ...] = (6, 14, 22, 30, 38)  # blocks that read the text
    patch_size: int = 1  # in packed latents
    rope_theta: float = 256.0

    @property
    def state_dim(self) -> int:
        """Return the width of one of the language model's states."""
        return self.text_dim // STATES_PER_BUNDLE

    @property
    def rotary_widths(self) -> tuple[int, int, int]:
        return self.head_width // 4, 3 * self.head_width // 8, 3 * self.head_width // 8

    def count_gist(self, tokens: int) -> int:
        """Return how many gist tokens the Perceiver makes from a text of `tokens` tokens."""
        share = min(max((tokens - MIN_TOKENS) / (MAX_TOKENS - MIN_TOKENS), 0.0), 1.0)
        step = self.max_gist // GIST_STEPS
        fewest = self.max_gist // 2
        return -int(-(fewest + share * (self.max_gist - fewest)) // step) * step


NOISE = NoiseSpec(training_offset=0.0, count_tokens=count_latents)
DIT = DitSpec(
    block_lists=("layers",),
    shared_inputs=(
        ("attention.to_q", "attention.to_k", "attention.to_v"),
        ("self_attention.to_q", "self_attention.to_k", "self_attention.to_v"),
        ("cross_attention.to_k", "cross_attention.to_v"),
        ("feed_forward.w1", "feed_forward.w3"),
        ("ffn.w1", "ffn.w3"),
    ),
    lora_lists=("noise_refiner", "perceiver"),
    lora_exclude=("_modulation",),
    fp8_exclude=("norm", "adaLN_modulation", "cross_attn_gate", "latent_queries"),
    input_layers=("x_embedder", "perceiver"),
    token_wise_methods=("feed",),
    modulated_input="modulated_input",
    # they compute in float32; under 1 % of the model
    keep_float32=("t_embedder.",),
)
