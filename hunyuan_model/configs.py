"""HunyuanVideo and SkyReels V1 as data: the dimensions of a transformer, and what it was trained with."""

from dataclasses import dataclass

# --hidden_state_skip_layer: layers of the language model behind the state that the transformer was trained
# with
SKIP_LAYERS = 2
# of the first frame's latents, behind the noisy ones where a model is conditioned on an image
IMAGE_CHANNELS = 16


@dataclass(frozen=True)
class HunyuanVideoConfig:
    """Dimensions of a HunyuanVideo transformer, read off a checkpoint's tensors."""

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
    pooled_dim: int  # width of the CLIP text encoder's pooled output
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    # guidance_in is there: the guidance scale is an input, one pass a step is enough
    has_guidance: bool = True
    rope_theta: float = 256.0
    eps: float = 1e-6

    @property
    def kind(self) -> str:
        """t2v or i2v: what the model is conditioned on beside the text."""
        return "i2v" if self.in_dim == self.out_dim + IMAGE_CHANNELS else "t2v"
