"""HunyuanImage-2.1 as data: the dimensions of a transformer, and settings of its training and generation."""

from dataclasses import dataclass

from modules.contract.release import ModelRelease

HUNYUAN_IMAGE = ModelRelease(
    ("tencent/HunyuanImage-2.1",),
    "Tencent Hunyuan Community",
    "other",
    "https://huggingface.co/tencent/HunyuanImage-2.1",
)
TEXT_TOKENS = 1024  # of a prompt that are kept
GLYPH_TOKENS = 128  # of the texts to be written in the picture


@dataclass(frozen=True)
class HunyuanImageConfig:
    """Dimensions of a HunyuanImage transformer, read from a checkpoint's tensors."""

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
    glyph_dim: int  # width of the glyph encoder's states
    glyph_hidden: tuple[int, int]  # widths inside the layers that turn these into tokens
    freq_dim: int = 256
    rope_theta: float = 256.0
    eps: float = 1e-6

    @property
    def kind(self) -> str:
        """What the model is conditioned on besides the text: nothing."""
        return "t2i"
