"""VACE: a second stack of Wan's blocks, which turns the control into hints for the first stack.

The stream c begins as the embedded control. Its first block adds x, as it enters the network's first block;
each block then runs on c as Wan's do on x, with the same text, time and positions, and a projection of its c
is the hint that is added after a block of the first stack. Source: the released code (ali-vilab/VACE) and
Jiang et al. 2025, arXiv 2503.07598.
"""
# Letters: B batch, L video tokens, C width

from typing import Any

from einops import rearrange
from torch import Tensor, nn

from modules.layers.norms import run_in_weight_dtype
from runtime.run_blocks import Hidden
from wan.configs import WanConfig
from wan.model import WanAttentionBlock, WanModel
from wan.spec import VACE_DIT, WanTokens


class WanVaceBlock(WanAttentionBlock):
    """A block of VACE's stack, which processes the control: it returns the next control tokens and a hint.

    The hint is added to the output of a block of Wan's own stack.

    All are B L C float32.
    """

    def __init__(self, config: WanConfig, index: int) -> None:
        super().__init__(config)
        self.before_proj = nn.Linear(config.dim, config.dim) if index == 0 else None
        self.after_proj = nn.Linear(config.dim, config.dim)

    def forward(self, control: Tensor, x: Tensor, tokens: WanTokens) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the next control tokens and the hint. `x` is the input of Wan's first block."""
        if self.before_proj is not None:
            control = run_in_weight_dtype(self.before_proj, control).float() + x
        control = super().forward(control, tokens)
        return control, run_in_weight_dtype(self.after_proj, control).float()


class WanVaceModel(WanModel):
    """Wan's text-to-video network with VACE's second stack of blocks, which runs only if control is given."""

    spec = VACE_DIT

    def __init__(self, config: WanConfig, *settings: Any) -> None:
        super().__init__(config, *settings)
        self.vace_patch_embedding = nn.Conv3d(
            config.vace_dim, config.dim, config.patch_size, config.patch_size
        )
        self.vace_blocks = nn.ModuleList(WanVaceBlock(config, index) for index in range(config.vace_layers))

    def embed(
        self,
        *inputs: Any,
        control: Tensor | None = None,
        hint_scales: Tensor | None = None,
        **named_inputs: Any,
    ) -> Hidden:
        """Embed the inputs as Wan does, and the control input for VACE's additional blocks.

        Args:
            *inputs: Inputs of `WanModel.embed`.
            control: B vace_dim F H W, of the noisy latents' size; None computes no hints.
            hint_scales: Factors of the hints, B layers; None for 1.
            **named_inputs: Inputs of `WanModel.embed`.
        """
        hidden = super().embed(*inputs, **named_inputs)
        if control is not None:
            # VACE's blocks process these tokens, and produce hints that are added to Wan's blocks
            patches = run_in_weight_dtype(self.vace_patch_embedding, control).float()
            hidden.control_tokens = rearrange(patches, "b c f h w -> b (f h w) c").contiguous()
            hidden.control_scales = hint_scales
        return hidden
