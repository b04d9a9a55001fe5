"""CLIP's towers, and the layers that they share with SigLIP's.

The text tower turns each prompt into a pooled state, that of its end token, and into states of all its
tokens. The image tower turns an image into one vector in the same space as the projected pooled states.
Module names follow Hugging Face's files. Source: Radford et al. 2021, arXiv 2103.00020.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from checkpoints.dialects import load_planned
from checkpoints.opening import open_checkpoint
from encoders.clip_checkpoints import (
    MEAN,
    STD,
    ClipNaming,
    ClipTextConfig,
    ClipVisionConfig,
    read_clip_text,
    read_clip_vision,
)
from modules.errors import CheckpointError
from modules.layers.norms import TwoLayerMlp
from protocols.family import DitSpec
from protocols.steps import Overrides
from runtime.run_blocks import Hidden, run_blocks

# Letters: B batch, L tokens, N heads, D head width, C = N * D


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class LayerConfig(Protocol):
    """The fields of a tower's configuration that its layers use."""

    @property
    def dim(self) -> int:
        """Channels of a token, C."""

    @property
    def ffn_dim(self) -> int:
        """Channels between the two linear layers of the feed-forward part."""

    @property
    def num_heads(self) -> int:
        """Number of attention heads, N."""

    @property
    def num_layers(self) -> int:
        """Number of layers of the tower."""

    @property
    def activation(self) -> str:
        """Name of the feed-forward activation, as in config.json."""

    @property
    def eps(self) -> float:
        """Epsilon of the layer norms."""


def check_activation(config: LayerConfig, path: Path, hint: str) -> None:
    """Raise CheckpointError, with a hint, if config.json has an unknown activation."""
    if config.activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: its config.json asks for the activation {config.activation}; {hint}.", path
        )


class ClipAttention(nn.Module):
    """Self-attention; if `is_causal`, each token attends only to itself and earlier tokens."""

    def __init__(self, config: LayerConfig, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.dim, config.dim)
        self.k_proj = nn.Linear(config.dim, config.dim)
        self.v_proj = nn.Linear(config.dim, config.dim)
        self.out_proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after attention, B L C like the input."""
        # each B N L D
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class ClipLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection.

    `tokens`, which `run_blocks` passes to every block, is ignored.
    """

    def __init__(self, config: LayerConfig, is_causal: bool) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.dim, config.eps)
        self.self_attn = ClipAttention(config, is_causal)
        self.layer_norm2 = nn.LayerNorm(config.dim, config.eps)
        sizes = (config.dim, config.ffn_dim, config.dim)
        self.mlp = TwoLayerMlp("fc1 fc2", sizes, ACTIVATIONS[config.activation])

    def forward(self, x: Tensor, tokens: None = None) -> Tensor:
        """Return the tokens after the layer, B L C like the input; `tokens` is unused."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipLayers(nn.Module):
    """Stack of layers, nested to match the tensor names in released files."""

    def __init__(self, config: LayerConfig, is_causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config, is_causal) for _ in range(config.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after all layers, B L C like the input."""
        for layer in self.layers:
            x = layer(x)
        return x


# Letters: B prompts, L tokens, C width


class ClipTextEmbeddings(nn.Module):
    """Sum of token and position embeddings."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.dim)
        self.position_embedding = nn.Embedding(config.positions, config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embedded tokens, B L C, for token ids B L."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class ClipText(nn.Module):
    """CLIP's text tower, with the projection of its pooled state if the model uses it."""

    spec = DitSpec(block_lists=("encoder.layers",))

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = ClipTextEmbeddings(config)
        self.encoder = ClipLayers(config, is_causal=True)
        self.final_layer_norm = nn.LayerNorm(config.dim, config.eps)
        self.text_projection: nn.Linear | None = None
        if config.projection_dim:
            self.text_projection = nn.Linear(config.dim, config.projection_dim, bias=False)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.final_layer_norm.weight.device

    @property
    def num_layers(self) -> int:
        """Number of layers of the text tower."""
        return len(self.encoder.layers)

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Return the pooled state of each prompt: B C, or B P if the model projects it.

        Attention is causal, so padding after the end token has no effect.

        Args:
            ids: Token ids, B L.
            ends: Position of the first end token of each prompt, B.
        """
        hidden = Hidden(self.embeddings(ids), None)
        self._run(hidden, range(self.num_layers))
        return self._pool(hidden.x, ends)

    def states(
        self, ids: Tensor, layer: int = 1, *, final_norm: bool = False, ends: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the states of all tokens after a layer, B L C; with `ends` also the pooled state, B C.

        Args:
            ids: Token ids, B L.
            layer: The layer, counted from the end: 1 (the last) to `num_layers`. transformers calls the
                result `hidden_states[-layer]`.
            final_norm: Whether to apply the tower's last norm to the states.
            ends: Position of each end token, B, for the pooled state; None skips the layers after `layer`.

        Raises:
            ValueError: If the layer does not exist.
        """
        if not 1 <= layer <= self.num_layers:
            raise ValueError(f"layer {layer} from the end of {self.num_layers}")
        num_layers_run = self.num_layers - layer + 1
        hidden = Hidden(self.embeddings(ids), None)
        self._run(hidden, range(num_layers_run))
        states = self.final_layer_norm(hidden.x) if final_norm else hidden.x
        if ends is None:
            return states, None
        # the pooled state always comes from the last layer
        self._run(hidden, range(num_layers_run, self.num_layers))
        return states, self._pool(hidden.x, ends)

    def _run(self, hidden: Hidden, layers: Iterable[int]) -> None:
        skipped = frozenset(range(self.num_layers)).difference(layers)
        run_blocks(self, hidden, Overrides(skip_blocks=skipped))

    def _pool(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return the end tokens' normalized states, B C or projected B P, from the last layer's B L C."""
        pooled = self.final_layer_norm(x[torch.arange(len(x), device=x.device), ends])
        return pooled if self.text_projection is None else self.text_projection(pooled)


def load_clip_text(path: Path, device: torch.device, dtype: torch.dtype, naming: ClipNaming) -> ClipText:
    """Load the text tower; fp8 weights are dequantized.

    Raises:
        CheckpointError: If the file is damaged or contains another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_clip_text(checkpoint, naming)
        check_activation(plan.config, path, "CLIP-L has quick_gelu")
        what = f"the CLIP text encoder ({naming.option})"
        return load_planned(plan, ClipText, device=device, dtype=dtype, label=what)


# Letters: B images, L patches and the class token, C width, P width of the projection


class ClipVisionEmbeddings(nn.Module):
    """Embed patches, prepend the class token, and add position embeddings."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.dim))
        self.patch_embedding = nn.Conv2d(
            3, config.dim, config.patch_size, stride=config.patch_size, bias=False
        )
        positions = (config.image_size // config.patch_size) ** 2 + 1
        self.position_embedding = nn.Embedding(positions, config.dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the class token and all patches, B L C, for pixels B 3 H W."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # B L-1 C
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        return x + self.position_embedding.weight


class ClipVision(nn.Module):
    """CLIP's image tower. Build it on the meta device and load a checkpoint with `load_clip_vision`."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.embeddings = ClipVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.dim, config.eps)  # misspelled as in the files
        self.encoder = ClipLayers(config, is_causal=False)
        self.post_layernorm = nn.LayerNorm(config.dim, config.eps)
        self.visual_projection = nn.Linear(config.dim, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the projected state of the class token, B P.

        Args:
            pixels: Square images, resized, cropped and normalized: B 3 S S.
        """
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.visual_projection(self.post_layernorm(x[:, 0]))

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode each image to one vector, B P, in the compute dtype, on the tower's device."""
        weight = self.visual_projection.weight
        return self(self.prepare(images).to(weight.device, weight.dtype))

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """Preprocess images for the tower, B 3 S S float32: resize, center-crop and normalize.

        Pillow resizes (bicubic, antialiased) the shorter side to S, like the released model's processor.
        """
        size = self.image_size
        squares = []
        for image in images:
            # the shorter side becomes `size`; the longer one is scaled and rounded down
            width, height = (size * length // min(image.size) for length in image.size)
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            left = (width - size) // 2
            top = (height - size) // 2
            squares.append(numpy.array(resized.crop((left, top, left + size, top + size))))
        pixels = rearrange(torch.from_numpy(numpy.stack(squares)), "b h w c -> b c h w").float() / 255
        return _normalize(pixels)

    def prepare_pixels(self, pixels: Tensor) -> Tensor:
        """Resize pixels, B 3 H W in 0..1, to B 3 S S, center-crop and normalize them, differentiably."""
        size = self.image_size
        shorter = min(pixels.shape[-2:])
        height, width = (size * length // shorter for length in pixels.shape[-2:])
        resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        top = (height - size) // 2
        left = (width - size) // 2
        return _normalize(resized[..., top : top + size, left : left + size])


def _normalize(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def load_clip_vision(
    path: Path, device: torch.device, dtype: torch.dtype, option: str, release: str
) -> ClipVision:
    """Load a CLIP image tower with its projection; fp8 weights are dequantized.

    Args:
        path: File or folder of the model.
        device: Device to load to.
        dtype: Compute dtype.
        option: Option that names the file, for messages.
        release: Description of the released files, for messages.

    Raises:
        CheckpointError: If the file is damaged or contains another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_clip_vision(checkpoint, option, release)
        check_activation(plan.config, path, "OpenCLIP has gelu")
        label = f"the CLIP image encoder ({option})"
        return load_planned(plan, ClipVision, device=device, dtype=dtype, label=label)
