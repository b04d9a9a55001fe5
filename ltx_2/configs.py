"""LTX-2 as data: dimensions of its transformer, names of its two streams, latents, presets of LoRAs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from protocols.data import LatentSpec
from protocols.family import DitSpec, NoiseSpec
from protocols.rules import ModelRelease


class Modality(NamedTuple):
    """The video stream or the audio stream, and the published names of its layers."""

    prefix: str  # before the names of its own modules and tables
    cross_modulation: str  # shifts and scales, for the entire model, of the attention between the streams
    cross_gate: str  # gate, for the entire model, of what the stream takes from the other one
    cross_table: str  # a block's shifts and scales of that attention
    cross_attn: str  # a block's attention from this stream to the other one


VIDEO = Modality(
    prefix="",
    cross_modulation="av_ca_video_scale_shift_adaln_single",
    cross_gate="av_ca_a2v_gate_adaln_single",
    cross_table="scale_shift_table_a2v_ca_video",
    cross_attn="audio_to_video_attn",
)
AUDIO = Modality(
    prefix="audio_",
    cross_modulation="av_ca_audio_scale_shift_adaln_single",
    cross_gate="av_ca_v2a_gate_adaln_single",
    cross_table="scale_shift_table_a2v_ca_audio",
    cross_attn="video_to_audio_attn",
)
# patterns of tensors, in either layout, that a network without the audio stream leaves out
AUDIO_TENSOR_PATTERNS = ("*audio*", "av_c*", "*_a2v_*")
# patterns of tensors that a network without the video stream leaves out
VIDEO_TENSOR_PATTERNS = (
    "*.attn[12].*",
    "*.ff.*",
    "scale_shift_table",
    "*.scale_shift_table",
    "*prompt_scale_shift_table",
    "patchify_proj.*",
    "proj_in.*",
    "proj_out.*",
    "adaln_single.*",
    "time_embed.*",
    "caption_projection.*",
    "prompt_adaln*",
    "keyframes_*",
    "av_c*",
    "*_a2v_*",
    "*.audio_to_*",
    "*.video_to_*",
)


@dataclass(frozen=True)
class StreamConfig:
    """Dimensions of the video or the audio stream."""

    dim: int
    ffn_dim: int
    channels: int  # width of a token: that of a latent pixel, or of an audio frame
    text_dim: int  # width of the text states, before projection if `LtxConfig.projects_text`
    ff_bias: bool = True  # whether feed-forward layers have a bias; in LTX-2.5, those of video do not


@dataclass(frozen=True)
class LtxConfig:
    """Dimensions of an LTX-2 transformer, read from a checkpoint's tensors and its record of settings."""

    video: StreamConfig
    audio: StreamConfig | None  # None: the audio stream is left out
    num_heads: int  # number of heads in both streams and in the attention between them
    num_layers: int
    cross_dim: int  # width of the attention between the streams
    projects_text: bool  # LTX-2.0: states are projected here; later versions do so before the connectors
    has_head_gates: bool  # LTX-2.3: heads have gates
    modulates_text: bool  # LTX-2.3: attention to the text is modulated too
    modulates_text_by_timestep: bool = True  # with `modulates_text`; False: by constants
    # LTX-2.5: a vector is added to tokens of latent frames that cover a single frame, such as the first one
    has_single_frame_embedding: bool = False
    rotates_halves: bool = True  # rotary pairs are channels of a head's two halves; False: neighbors
    # factor on the timestep of the gates between the streams, relative to all other layers
    gate_timestep_scale: float = 1.0
    has_video: bool = True  # whether the network has the video stream
    freq_dim: int = 256
    rope_theta: float = 10000.0
    max_positions: tuple[float, float, float] = (20.0, 2048.0, 2048.0)  # seconds, rows, columns of pixels
    stride: tuple[int, int, int] = (8, 32, 32)  # pixels of a latent: frames, rows, columns

    @property
    def dim(self) -> int:
        """Return the width of the video stream."""
        return self.video.dim

    @property
    def kind(self) -> str:
        """Return the release with these dimensions: 2.0, 2.3 or 2.5."""
        is_new = self.has_single_frame_embedding or not self.video.ff_bias
        if is_new:
            return "2.5"
        return "2.3" if self.has_head_gates else "2.0"

    @property
    def streams(self) -> dict[Modality, StreamConfig]:
        """Return the dimensions of each stream in this network."""
        streams = {}
        if self.has_video:
            streams[VIDEO] = self.video
        if self.audio is not None:
            streams[AUDIO] = self.audio
        return streams


EPS = 1e-6  # in the norms of tokens, queries and keys
MEL_STRIDE, MEL_RATE = 4, 100.0  # frames of the mel spectrogram: of a latent, and in a second

LATENT = LatentSpec(
    channels=128,
    stride=(8, 32, 32),
    pixel_step=32,
    frame_step=8,
    default_fps=25.0,  # default of target_fps in the tables of musubi-tuner's fork, docs/ltx_2.md
)


def count_tokens(shape: Sequence[int]) -> int:
    """Return the number of tokens: F*H*W for clip latents, B C F H W, and T for audio, B C T M."""
    return math.prod(shape[2:]) if len(shape) == 5 else shape[2]


NOISE = NoiseSpec(training_offset=0.0, count_tokens=count_tokens)


@dataclass(frozen=True)
class Ltx2Release:
    """Default settings of an LTX-2 release."""

    release: ModelRelease
    steps: int
    perturbed_block: int  # whose self-attention guidance skips
    crf: int  # H.264 quality to which a first image is compressed; 0: not compressed


_LICENSE = ("LTX-2 Community License", "other", "https://github.com/Lightricks/LTX-2/blob/main/LICENSE")
RELEASES = {
    "2.0": Ltx2Release(ModelRelease(("Lightricks/LTX-2",), *_LICENSE), 40, 29, 33),
    "2.3": Ltx2Release(ModelRelease(("Lightricks/LTX-2.3",), *_LICENSE), 30, 28, 33),
    "2.5": Ltx2Release(ModelRelease(("Lightricks/LTX-2.5",), *_LICENSE), 30, 28, 18),
}
# as released
NEGATIVE_PROMPT = (
    "blurry, out of focus, overexposed, underexposed, low contrast, washed out colors, excessive noise, "
    "grainy texture, poor lighting, flickering, motion blur, distorted proportions, unnatural skin tones, "
    "deformed facial features, asymmetrical face, missing facial features, extra limbs, disfigured hands, "
    "wrong hand count, artifacts around text, inconsistent perspective, camera shake, incorrect depth of "
    "field, background too sharp, background clutter, distracting reflections, harsh shadows, inconsistent "
    "lighting direction, color banding, cartoonish rendering, 3D CGI look, unrealistic materials, uncanny "
    "valley effect, incorrect ethnicity, wrong gender, exaggerated expressions, wrong gaze direction, "
    "mismatched lip sync, silent or muted audio, distorted voice, robotic voice, echo, background noise, "
    "off-sync audio, incorrect dialogue, added dialogue, repetitive speech, jittery movement, awkward "
    "pauses, incorrect timing, unnatural transitions, inconsistent framing, tilted camera, flat lighting, "
    "inconsistent tone, cinematic oversaturation, stylized filters, or AI artifacts."
)
DIT = DitSpec(
    block_lists=("transformer_blocks",),
    shared_inputs=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("audio_attn1.to_q", "audio_attn1.to_k", "audio_attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),
        ("audio_attn2.to_k", "audio_attn2.to_v"),
        ("audio_to_video_attn.to_k", "audio_to_video_attn.to_v"),
        ("video_to_audio_attn.to_k", "video_to_audio_attn.to_v"),
    ),
    fp8_exclude=("norm", "to_gate_logits"),
    # as in released trainers: LoRAs are only on attention layers
    lora_exclude=("ff.", "to_gate_logits"),
    input_layers=(
        "patchify_proj",
        "audio_patchify_proj",
        "caption_projection",
        "audio_caption_projection",
    ),
    token_wise_methods=("feed_forward",),
    modulated_input="modulated_input",
)

# --lora_target_preset -> the modules of a block that get a LoRA, as patterns. Source: the documentation of
# musubi-tuner's fork for LTX-2
_LINEARS = r"(?:to_[qkv]|to_out\.0)$"
_VIDEO_SELF, _VIDEO_FFN = rf".*\.attn1\.{_LINEARS}", r".*\.ff\.net\."
_ATTENTIONS, _ALL_FFN = rf".*attn\d?\.{_LINEARS}", r".*ff\.net\."
_AUDIO = (rf".*\.audio_attn\d\.{_LINEARS}", r".*\.audio_ff\.net\.")
_CROSS = {name: rf".*\.{name}\.{_LINEARS}" for name in (VIDEO.cross_attn, AUDIO.cross_attn)}
LORA_PRESETS: dict[str, tuple[str, ...]] = {
    "t2v": (_ATTENTIONS,),
    "video_sa": (_VIDEO_SELF,),
    "video_sa_ff": (_VIDEO_SELF, _VIDEO_FFN),
    "video_sa_ca_ff": (_VIDEO_SELF, rf".*\.attn2\.{_LINEARS}", _VIDEO_FFN),
    "v2v": (_VIDEO_SELF, rf".*\.attn2\.{_LINEARS}", _VIDEO_FFN),
    "audio": _AUDIO,
    "audio_v2a": (*_AUDIO, _CROSS[AUDIO.cross_attn]),
    "full": (".*",),
    "audio_ref_ic": (*_AUDIO, *_CROSS.values()),
    **dict.fromkeys(("av_ic", "video_ref_only_av"), (_ATTENTIONS, _ALL_FFN)),
}
