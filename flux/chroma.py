"""Chroma's approximator: a small network that makes all modulations of a pass from timestep and guidance.

It takes the place of the modulation layers of FLUX.1 and of the embeddings in front of them. Source: the
released code of Chroma. Module names follow the published checkpoints.
"""
# Letters: B batch, M modulations, C width of the transformer, D width of the approximator

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from flux.configs import ApproximatorConfig
from flux.spec import GUIDANCE_UNIT
from modules.layers.norms import ScaleNorm
from modules.layers.precision import in_own_dtype
from modules.layers.sinusoid import sinusoid


class ApproximatorLayer(nn.Module):
    """Two layers with a SiLU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(dim, dim)
        self.out_layer = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return in_own_dtype(self.out_layer, functional.silu(in_own_dtype(self.in_layer, x)))


class Approximator(nn.Module):
    """Make the modulations of all blocks. It is never trained here: no gradient goes into it."""

    def __init__(self, config: ApproximatorConfig, rows: int, out_dim: int, eps: float) -> None:
        """rows: M, how many modulations. out_dim: C."""
        super().__init__()
        self.config, self.rows = config, rows
        self.in_proj = nn.Linear(config.in_dim, config.dim)
        self.layers = nn.ModuleList(ApproximatorLayer(config.dim) for _ in range(config.layers))
        self.norms = nn.ModuleList(ScaleNorm(config.dim, eps) for _ in range(config.layers))
        self.out_proj = nn.Linear(config.dim, out_dim)

    @torch.no_grad()
    def forward(self, timesteps: Tensor, guidance: Tensor) -> Tensor:
        """Return B M C float32. timesteps: B, 0..1000. guidance: B, as it is asked for."""
        number = torch.arange(self.rows, dtype=torch.float32, device=timesteps.device)
        numbered = sinusoid(GUIDANCE_UNIT * number, self.config.in_dim // 2, torch.float32)  # M in/2
        shared = torch.cat(
            [
                sinusoid(value, self.config.in_dim // 4, torch.float32)
                for value in (timesteps, GUIDANCE_UNIT * guidance)
            ],
            dim=1,
        )  # B in/2
        batch = len(timesteps)
        x = torch.cat(
            [
                shared.unsqueeze(1).expand(batch, self.rows, -1),
                numbered.unsqueeze(0).expand(batch, -1, -1),
            ],
            dim=2,
        )
        x = in_own_dtype(self.in_proj, x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return in_own_dtype(self.out_proj, x).float()
