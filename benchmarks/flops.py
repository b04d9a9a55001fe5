"""How many floating-point operations a transformer's pass takes; a multiplication and an addition are two.

Counted are the Linear layers of the blocks and attention, which are all but a hundredth of the work.
"""
# Letters: L video tokens, T text tokens, C width, F width of the feed-forward

from dataclasses import dataclass

from hunyuan_model.configs import HunyuanVideoConfig
from wan.configs import WanConfig

# a step in forwards: forward, recomputation, and of the backward pass
RECOMPUTED = {"linear": 3.0, "attention": 4.5}
KEPT = {"linear": 2.0, "attention": 3.5}  # 1 for a linear (its weight has no gradient), 2.5 for attention


@dataclass(frozen=True)
class Work:
    """Operations of one forward pass for one sample."""

    linear: float
    attention: float

    @property
    def forward(self) -> float:
        return self.linear + self.attention

    def lora_step(self, checkpointing: bool) -> float:
        """Operations the hardware does in a training step of a LoRA, the recomputation of gradient
        checkpointing included.

        The base is frozen, so its layers have no weight gradients; those of the LoRA are left out.
        """
        times = RECOMPUTED if checkpointing else KEPT
        return times["linear"] * self.linear + times["attention"] * self.attention


def wan_work(config: WanConfig, video_tokens: int) -> Work:
    """video_tokens: L. The text is padded to `text_len` tokens, image tokens (257) where the model has
    them.
    """
    dim, text = config.dim, config.text_len + (257 if config.has_image else 0)
    per_video = 6 * dim**2 + 2 * dim * config.ffn_dim  # q, k, v, o; q and o of cross-attention; feed-forward
    linear = 2 * (video_tokens * per_video + text * 2 * dim**2)
    attention = 4 * video_tokens**2 * dim + 4 * video_tokens * text * dim
    return Work(config.num_layers * linear, config.num_layers * attention)


def hunyuan_work(config: HunyuanVideoConfig, video_tokens: int, text_tokens: int) -> Work:
    """video_tokens: L. text_tokens: T, those that are not padding."""
    dim, tokens = config.dim, video_tokens + text_tokens
    # qkv, projection, feed-forward; text has the same with weights of its own
    double = 4 * dim**2 + 2 * dim * config.ffn_dim
    single = dim * (3 * dim + config.ffn_dim) + (dim + config.ffn_dim) * dim
    linear = 2 * tokens * (config.double_blocks * double + config.single_blocks * single)
    attention = (config.double_blocks + config.single_blocks) * 4 * tokens**2 * dim
    return Work(linear, attention)
