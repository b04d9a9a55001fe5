"""Count the floating-point operations of a transformer; a multiplication and an addition are two.

Only attention and the Linear layers of the blocks are counted, which is about 99 % of the work. Layers on one
vector instead of tokens, the first and the last layers, text refiners and LoRAs are left out.
"""
# Letters: L video or image tokens, T text tokens, C width, F width of the feed-forward

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flux_3.configs import Flux3Config
from krea2.configs import Krea2Config
from ltx_2.configs import LtxConfig
from lumina.configs import LuminaConfig
from minimax_h3.configs import H3Config
from moss_image.configs import MossImageConfig
from qwen_image_21.configs import QwenImage21Config
from wan.configs import WanConfig

# cost of a step in forward passes: forward, recomputation and backward
RECOMPUTED = {"linear": 3.0, "attention": 4.5}
KEPT = {"linear": 2.0, "attention": 3.5}  # 1 for a linear (its weight has no gradient), 2.5 for attention
IMAGE_TOKENS = 257  # of CLIP, for Wan2.1 models that take an image


class JointConfig(Protocol):
    """Dimensions that HunyuanVideo, FramePack, FLUX.1, Chroma and HunyuanImage share."""

    @property
    def dim(self) -> int:
        """Width of the tokens."""

    @property
    def ffn_dim(self) -> int:
        """Width inside the feed-forward."""

    @property
    def double_blocks(self) -> int:
        """Number of double blocks."""

    @property
    def single_blocks(self) -> int:
        """Number of single blocks."""


@dataclass(frozen=True)
class JointBlocks:
    """The same dimensions, for a transformer whose config has other names for them."""

    dim: int
    ffn_dim: int
    double_blocks: int
    single_blocks: int = 0


@dataclass(frozen=True)
class Work:
    """Operations of one forward pass for one sample.

    Attributes:
        linear: Operations of linear layers in the blocks.
        attention: Operations of the tokens' attention to each other.
        cross: Operations of attention to a text.
        outside: Work of layers that are never recomputed.
        last: Part of `linear` in the last layer of each block, on whose output no gradient depends.
    """

    linear: float
    attention: float
    cross: float = 0.0
    outside: "Work | None" = None
    last: float = 0.0

    @property
    def forward(self) -> float:
        """Total operations of the pass."""
        return self.linear + self.attention + self.cross + (self.outside.forward if self.outside else 0.0)

    def lora_step(
        self, checkpointing: bool, keeps_attention: bool = False, ends_early: bool = False
    ) -> float:
        """Return the operations of a LoRA training step, whose frozen base has no weight gradients.

        Args:
            checkpointing: Count recomputation.
            keeps_attention: Self-attention is not recomputed.
            ends_early: The last layer of a block is not recomputed either, as in uncompiled code with 16-bit
                weights.
        """
        times = RECOMPUTED if checkpointing else KEPT
        own = KEPT if keeps_attention else times
        others = 0.0 if self.outside is None else self.outside.lora_step(checkpointing=False)
        mine = times["linear"] * self.linear + times["attention"] * self.cross
        left_out = self.last if checkpointing and ends_early else 0.0
        return mine + own["attention"] * self.attention + others - left_out


def wan_work(config: WanConfig, video_tokens: int) -> Work:
    """Return the work of a Wan transformer on `video_tokens` tokens (L).

    The text is padded to `text_len` tokens; 257 image tokens are added if the model takes an image.
    """
    dim, text = config.dim, config.text_len + (IMAGE_TOKENS if config.has_image else 0)
    per_video = 6 * dim**2 + 2 * dim * config.ffn_dim  # q, k, v, o; q and o of cross-attention; feed-forward
    linear = 2 * (video_tokens * per_video + text * 2 * dim**2)
    layers = config.num_layers
    own, cross = 4 * video_tokens**2 * dim, 4 * video_tokens * text * dim
    last = 2 * video_tokens * dim * config.ffn_dim
    return Work(layers * linear, layers * own, layers * cross, last=layers * last)


def joint_work(config: JointConfig, video_tokens: int, text_tokens: int) -> Work:
    """Return the work of a transformer of double and single blocks, in which all tokens see each other.

    Args:
        config: Dimensions.
        video_tokens: L, including those of finished latents.
        text_tokens: T without padding, including those of an image.
    """
    dim, tokens = config.dim, video_tokens + text_tokens
    # qkv, projection, feed-forward; the text has the same with its own weights
    double = 4 * dim**2 + 2 * dim * config.ffn_dim
    single = dim * (3 * dim + config.ffn_dim) + (dim + config.ffn_dim) * dim
    linear = 2 * tokens * (config.double_blocks * double + config.single_blocks * single)
    attention = (config.double_blocks + config.single_blocks) * 4 * tokens**2 * dim
    # the image is the last stream of a double block
    ends = (
        config.double_blocks * video_tokens * config.ffn_dim,
        config.single_blocks * tokens * (dim + config.ffn_dim),
    )
    return Work(linear, attention, last=2 * dim * sum(ends))


def gated_work(config: Krea2Config, image_tokens: int, text_tokens: int) -> Work:
    """Return the work of Krea 2: gated attention with grouped keys, gated feed-forward, one stream.

    The few blocks that fuse the states of the language model are left out: about half a percent.
    """
    dim, tokens = config.dim, image_tokens + text_tokens
    keys_and_values = 2 * config.num_kv_heads * config.head_width
    per_token = 3 * dim**2 + dim * keys_and_values + 3 * dim * config.ffn_dim
    linear = config.num_layers * 2 * tokens * per_token
    attention = config.num_layers * 4 * tokens**2 * dim
    return Work(linear, attention, last=config.num_layers * 2 * tokens * dim * config.ffn_dim)


def ltx_work(config: LtxConfig, video_tokens: int, text_tokens: int) -> Work:
    """Return the work of the video stream of LTX-2, without audio."""
    dim, ffn_dim, layers = config.video.dim, config.video.ffn_dim, config.num_layers
    per_video = 6 * dim**2 + 2 * dim * ffn_dim  # q, k, v, o; q and o of cross-attention; feed-forward
    linear = 2 * (video_tokens * per_video + text_tokens * 2 * dim**2)
    attention = 4 * video_tokens**2 * dim
    cross = 4 * video_tokens * text_tokens * dim
    last = 2 * video_tokens * dim * ffn_dim
    return Work(layers * linear, layers * attention, layers * cross, last=layers * last)


def lumina_work(config: LuminaConfig, image_tokens: int, text_tokens: int) -> Work:
    """Return the work of Lumina-Image-2.0, with the layers that refine image (L) and caption (T) alone."""
    dim = config.dim
    qkv = dim * (config.num_heads + 2 * config.num_kv_heads) * config.head_width
    per_token = qkv + dim**2 + 3 * dim * config.ffn_dim

    def of_layers(count: int, tokens: int) -> Work:
        return Work(count * 2 * tokens * per_token, count * 4 * tokens**2 * dim)

    image = of_layers(config.noise_refiner_layers, image_tokens)
    caption = of_layers(config.context_refiner_layers, text_tokens)
    refining = Work(image.linear + caption.linear, image.attention + caption.attention)
    joint = of_layers(config.num_layers, image_tokens + text_tokens)
    return Work(joint.linear, joint.attention, outside=refining)


def flux_3_work(config: Flux3Config, image_tokens: int, text_tokens: int) -> Work:
    """Return the work of FLUX 3 without references: blocks of each kind of tokens, then joint blocks.

    A block's attention and its gated feed-forward have the same input.
    """
    dim, tokens = config.dim, image_tokens + text_tokens
    per_token = 4 * dim**2 + 3 * dim * config.ffn_dim
    passed = (config.mode_blocks + config.joint_blocks) * tokens  # no block of references has tokens
    alone = config.mode_blocks * (image_tokens**2 + text_tokens**2)
    attention = 4 * dim * (alone + config.joint_blocks * tokens**2)
    return Work(2 * passed * per_token, attention, last=2 * passed * dim * config.ffn_dim)


def qwen_image_21_work(config: QwenImage21Config, image_tokens: int, text_tokens: int) -> Work:
    """Return the work of Qwen-Image-2.1 without references.

    The image's tokens see all tokens, and the text's see only earlier ones; all of them are counted here.
    """
    dim, tokens = config.dim, image_tokens + text_tokens
    per_token = 4 * dim**2 + 3 * dim * config.ffn_dim
    linear = config.num_layers * 2 * tokens * per_token
    pairs = image_tokens * tokens + text_tokens**2
    last = config.num_layers * 2 * image_tokens * dim * config.ffn_dim
    return Work(linear, config.num_layers * 4 * pairs * dim, last=last)


def moss_image_work(config: MossImageConfig, image_tokens: int, text_tokens: int) -> Work:
    """Return the work of MOSS-Image without references: all tokens see each other, in equal blocks."""
    dim, tokens = config.dim, image_tokens + text_tokens
    linear = config.num_layers * 2 * tokens * (4 * dim**2 + 3 * dim * config.ffn_dim)
    attention = config.num_layers * 4 * tokens**2 * dim
    return Work(linear, attention, last=config.num_layers * 2 * tokens * dim * config.ffn_dim)


def h3_work(config: H3Config, media_tokens: int, text_tokens: int) -> Work:
    """Return the work of MiniMax-H3 on frames and audio (together L) and text (T), which see each other."""
    dim, tokens = config.dim, media_tokens + text_tokens
    per_token = 4 * dim * config.inner_dim + 3 * dim * config.ffn_dim
    linear = config.num_layers * 2 * tokens * per_token
    attention = config.num_layers * 4 * tokens**2 * config.inner_dim
    return Work(linear, attention, last=config.num_layers * 2 * tokens * dim * config.ffn_dim)


def unet_work(config: Mapping[str, Any], rows: int, columns: int, text_tokens: int) -> Work:
    """Return the work of a U-Net of Stable Diffusion, counted by torch on tensors without content.

    The layers between the levels, which are not recomputed, count as if they were: a few percent.

    Args:
        config: Settings of diffusers' class.
        rows: Height of the latents.
        columns: Width of the latents.
        text_tokens: Length of each text, with padding.
    """
    import torch  # only here and below: other counts need neither
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
        noisy = torch.empty(1, network.config["in_channels"], rows, columns)
        states = torch.empty(1, text_tokens, network.config["cross_attention_dim"])
        added = None
        if network.config["addition_embed_type"] is not None:
            sizes = 6 * network.config["addition_time_embed_dim"]
            pooled = network.config["projection_class_embeddings_input_dim"] - sizes
            added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        timesteps = torch.empty(1)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=added)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for name, count in counts.items() if "attention" in str(name) or "bmm" in str(name))
    return Work(float(sum(counts.values()) - attention), float(attention))
