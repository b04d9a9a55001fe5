"""HunyuanVideo and SkyReels V1 as data: the dimensions of a transformer, and settings of its training."""

from dataclasses import dataclass

from protocols.rules import ModelRelease

# channels of the first frame's latents, after the noisy ones if a model is conditioned on an image
IMAGE_CHANNELS = 16
HUNYUAN_VIDEO = ModelRelease(
    ("tencent/HunyuanVideo",),
    "Tencent Hunyuan Community",
    "other",
    "https://github.com/Tencent-Hunyuan/HunyuanVideo/blob/main/LICENSE.txt",
)
SKYREELS_I2V = ModelRelease(
    ("Skywork/SkyReels-V1-Hunyuan-I2V",),
    "Skywork Community",
    "other",
    "https://huggingface.co/Skywork/SkyReels-V1-Hunyuan-T2V",
)


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Dimensions of a transformer of double and single blocks with a token refiner."""

    dim: int
    ffn_dim: int
    num_heads: int
    double_blocks: int
    single_blocks: int
    refiner_blocks: int
    refiner_ffn_dim: int
    in_dim: int
    out_dim: int
    text_dim: int  # width of the language model's states
    freq_dim: int = 256
    rope_theta: float = 256.0
    eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoConfig(JointConfig):
    """Dimensions of a HunyuanVideo transformer, read from a checkpoint's tensors."""

    pooled_dim: int  # width of the CLIP text encoder's pooled output
    patch_size: tuple[int, int, int] = (1, 2, 2)
    # the file has guidance_in: the guidance scale is an input, so one pass per step is enough
    has_guidance: bool = True

    @property
    def kind(self) -> str:
        """Condition in addition to the text: t2v (none) or i2v (an image)."""
        return "i2v" if self.in_dim == self.out_dim + IMAGE_CHANNELS else "t2v"
