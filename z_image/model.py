"""The transformer of Z-Image: the network of Lumina-Image-2.0 with other layers around the same steps.

Names of modules are the released ones, which are those of diffusers. Source: the released code, and Cai et
al. 2025, arXiv 2511.22699. `lumina.blocks` lists the steps in float32. Texts and images are padded with
learned tokens, which take part in attention; only the rows that another sample's longer text adds to a batch
are masked.
"""
# Letters: B batch, L image tokens with padding, T text tokens with padding, C width of the model

import torch
from torch import Tensor, nn

from lumina.blocks import GroupedAttention, Heads, JointTransformerBlock, LuminaFinalLayer, TimeEmbedding
from lumina.configs import LuminaConfig
from lumina.model import LuminaModel
from modules.devices import tensor_on
from modules.integers import round_up
from modules.layers.norms import RMSNorm, run_in_weight_dtype
from z_image.configs import DIT, TIME_SCALE, TOKEN_STEP, ZImageConfig

PATCH_KEY = "2-1"  # part of the names of layers for patches of 2 x 2 latent pixels of one frame


class ZImageAttention(GroupedAttention):
    """Self-attention with separate matrices for queries, keys and values."""

    def __init__(self, config: LuminaConfig) -> None:
        nn.Module.__init__(self)
        self.num_heads = self.num_kv_heads = config.num_heads
        dim = config.dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q = RMSNorm(config.head_width, config.eps)
        self.norm_k = RMSNorm(config.head_width, config.eps)

    def heads(self, x: Tensor) -> Heads:
        """Return query, key and value heads of tokens B L C, each B L N D; q and k are normalized."""
        query, key, value = (
            run_in_weight_dtype(layer, x).unflatten(-1, (self.num_heads, -1))
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return self.norm_q(query), self.norm_k(key), value

    def project(self, attended: Tensor) -> Tensor:
        """Project the concatenated heads of attention, B L C, to the layer's output, B L C."""
        return run_in_weight_dtype(self.to_out[0], attended)


class ZImageTransformerBlock(JointTransformerBlock):
    """Attention and feed-forward, each normalized before and after; modulated without an activation."""

    attention_class = ZImageAttention
    activates_time = False


class ZImageModel(LuminaModel):
    """Predict the direction from noise to data for noisy image latents, given the states of Qwen3."""

    spec = DIT
    block_class = ZImageTransformerBlock

    def make_outer_layers(self, config: LuminaConfig, first: nn.Linear) -> None:
        """Build the time embedding, the layers around the blocks, and the padding tokens."""
        assert isinstance(config, ZImageConfig)
        self.t_embedder = TimeEmbedding(config, config.time_hidden)
        self.all_x_embedder = nn.ModuleDict({PATCH_KEY: first})
        self.all_final_layer = nn.ModuleDict({PATCH_KEY: LuminaFinalLayer(config)})
        self.x_pad_token = nn.Parameter(torch.empty(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.empty(1, config.dim))

    @property
    def last(self) -> LuminaFinalLayer:
        """Return the final layer, which projects tokens to patches."""
        layer = self.all_final_layer[PATCH_KEY]
        assert isinstance(layer, LuminaFinalLayer)
        return layer

    def embed_time(self, times: Tensor) -> Tensor:
        """Embed the fraction of data in the noisy latents, B to B time_dim float32."""
        return super().embed_time(times * TIME_SCALE)

    def count_padded_tokens(self, real: int) -> int:
        """Return the number of tokens of a text or image after padding."""
        return round_up(real, TOKEN_STEP)

    def embed_image(self, patches: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed patches, B P 4Z, as image tokens, B L C, with padding tokens at the end."""
        tokens = run_in_weight_dtype(self.all_x_embedder[PATCH_KEY], patches).to(dtype)
        return _fill_up(tokens, self.x_pad_token, self.count_padded_tokens(tokens.shape[1]))

    def embed_caption(self, caption: Tensor, counts: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Embed text states as tokens, B T C; learned padding tokens follow the last real one.

        `counts` are the numbers of real states of the samples.
        """
        tokens = super().embed_caption(caption, counts, dtype)
        if min(counts) < tokens.shape[1]:
            places = tensor_on(tokens.device, range(tokens.shape[1]))
            is_real = places < tensor_on(tokens.device, counts)[:, None]
            tokens = torch.where(is_real[..., None], tokens, self.cap_pad_token.to(dtype))
        return _fill_up(tokens, self.cap_pad_token, self.count_padded_tokens(tokens.shape[1]))


def _fill_up(tokens: Tensor, pad: Tensor, length: int) -> Tensor:
    """Pad tokens, B n C, with copies of a token, 1 C, to B `length` C."""
    missing = length - tokens.shape[1]
    if not missing:
        return tokens
    padding = pad.to(tokens.dtype).expand(len(tokens), missing, -1)
    return torch.cat([tokens, padding], dim=1)
