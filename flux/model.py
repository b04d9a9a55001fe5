"""The transformer of FLUX.1 and of Chroma. Module names follow the published checkpoints.

Source: the released code of FLUX.1 (Black Forest Labs) and of Chroma. `blocks.py` lists the steps in float32.
"""
# Letters: B batch, L image tokens, with those of references, T text tokens, N heads, D head width,
# C = N * D, M modulations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from flux.blocks import DoubleBlock, ModulationRows, SingleBlock, make_modulation
from flux.configs import PATCH, ApproximatorConfig, FluxConfig
from flux.spec import GUIDANCE_UNIT, dit_spec
from hunyuan_model.blocks import EmbeddedText, HunyuanTokens, apply_silu, join_tokens
from hunyuan_model.model import TWO_LAYERS, HunyuanFinalLayer, real_tokens, rotary_widths
from modules.attention.attend import SampleLengths, make_lengths
from modules.layers.norms import ScaleNorm, TwoLayerMlp, activation_dtype, run_in_weight_dtype
from modules.layers.rope import GridTable, TokenGrid, bind_rotary_table, joined_tables, rotary_table, sinusoid
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import BlockNetwork, Hidden


class Approximator(nn.Module):
    """Compute all blocks' modulations; only full training trains this network."""

    def __init__(self, config: ApproximatorConfig, rows: int, out_dim: int, eps: float) -> None:
        """Build the network for M = `rows` modulations of C = `out_dim` channels each."""
        super().__init__()
        self.config, self.num_rows = config, rows
        self.in_proj = nn.Linear(config.in_dim, config.dim)
        sizes = (config.dim,) * 3
        self.layers = nn.ModuleList(TwoLayerMlp(TWO_LAYERS, sizes) for _ in range(config.layers))
        self.norms = nn.ModuleList(ScaleNorm(config.dim, eps) for _ in range(config.layers))
        self.out_proj = nn.Linear(config.dim, out_dim)

    def forward(self, timesteps: Tensor, guidance: Tensor) -> Tensor:
        """Compute all modulation rows, B M C float32, from timesteps B, 0..1000, and unscaled guidance B."""
        learns = any(weight.requires_grad for weight in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):  # no gradient for a LoRA
            return self._make_rows(timesteps, guidance)

    def _make_rows(self, timesteps: Tensor, guidance: Tensor) -> Tensor:
        """Return the modulation rows of all blocks, B M D, from timestep, guidance and each row's number."""
        in_dim = self.config.in_dim
        batch = len(timesteps)
        row_index = torch.arange(self.num_rows, dtype=torch.float32, device=timesteps.device)
        index_embedding = sinusoid(GUIDANCE_UNIT * row_index, in_dim // 2, torch.float32)  # M in/2
        time_embedding = sinusoid(timesteps, in_dim // 4, torch.float32)
        guidance_embedding = sinusoid(GUIDANCE_UNIT * guidance, in_dim // 4, torch.float32)
        sample_embedding = torch.cat([time_embedding, guidance_embedding], dim=1)  # B in/2
        # each row of each sample: the sample's embedding, then the row's, B M in
        x = torch.cat(
            [
                sample_embedding.unsqueeze(1).expand(batch, self.num_rows, -1),
                index_embedding.unsqueeze(0).expand(batch, -1, -1),
            ],
            dim=2,
        )
        x = run_in_weight_dtype(self.in_proj, x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return run_in_weight_dtype(self.out_proj, x).float()


class FluxFinalLayer(HunyuanFinalLayer):
    """Final norm, modulated, and projection of tokens to their patches."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__(config.dim, config.token_dim, config.eps)
        if config.approximator is not None:
            self.adaLN_modulation = make_modulation(config, "final")

    def modulation(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return shift and scale, each B 1 C float32."""
        if isinstance(self.adaLN_modulation, ModulationRows):
            return self.adaLN_modulation(vector)
        return super().modulation(vector)


class FluxModel(BlockNetwork):
    """Predict the velocity of noisy latents of an image from states of T5 and a vector of CLIP-L.

    Simplified, without references, a second text, a ControlNet and the code around the blocks; Chroma has the
    modulations of all blocks from `distilled_guidance_layer` instead:

        image = img_in(patches of noisy)                                  # B L C
        text = txt_in(t5)                                                   # B T C
        vector = time_in(timesteps) + vector_in(pooled) + guidance_in(guidance)                # B C
        for block in double_blocks:
            rows, text_rows = block.img_mod(vector), block.txt_mod(vector)  # each 6: shifts, scales, gates
            branches = attention of modulated image and text to each other                      # B L+T C
            image, text = each + gate * proj(its branch), then + gate * mlp(modulated)
        x = cat([image, text])
        for block in single_blocks:                  # attention and feed-forward in parallel
            x = x + gate * linear2(attention and gelu of linear1(modulated x))
        velocity = final_layer(x[:, :L], vector)     # B L Z*4, returned as B Z 1 H W
    """

    compute_dtype_parameter = "img_in.bias"

    def __init__(self, config: FluxConfig, attention: AttentionChoice = SDPA) -> None:
        """Build the network of FLUX.1 or Chroma without weights."""
        super().__init__()
        self.config = config
        self.attention = attention
        self.spec = dit_spec(config.kind)
        dim = config.dim
        self.img_in = nn.Linear(config.token_dim, dim)
        self.txt_in = nn.Linear(config.text_dim, dim)
        # Chroma computes all modulation with an approximator instead of the embeddings
        if config.approximator is None:
            number_sizes = (config.freq_dim, dim, dim)
            self.time_in = TwoLayerMlp(TWO_LAYERS, number_sizes, in_float32=True)
            self.vector_in = TwoLayerMlp(TWO_LAYERS, (config.pooled_dim, dim, dim), in_float32=True)
            if config.has_guidance:
                self.guidance_in = TwoLayerMlp(TWO_LAYERS, number_sizes, in_float32=True)
        else:
            self.distilled_guidance_layer = Approximator(
                config.approximator, config.modulations, dim, config.eps
            )
        self.double_blocks = nn.ModuleList(
            DoubleBlock(config, index) for index in range(config.double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(config, index) for index in range(config.single_blocks)
        )
        self.final_layer = FluxFinalLayer(config)
        # returns `Hidden.block_residuals` for a control image: FluxControl, or a ControlNet that is trained
        self.controlnet: Callable[..., list[Tensor | None]] | None = None
        self._modulation_rows = [module for module in self.modules() if isinstance(module, ModulationRows)]
        widths = rotary_widths(dim // config.num_heads)
        self._rotary = GridTable(joined_tables(bind_rotary_table(rotary_table, widths, config.rope_theta)))

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        t5: Tensor,
        t5_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        overrides: Overrides = NO_OVERRIDES,
        references: Sequence[Tensor] = (),
        control: Tensor | None = None,
        control_strength: float = 1.0,
    ) -> Hidden:
        """Embed images and text as tokens, B L+T C; return them with the blocks' other inputs.

        References follow the image; a second text, for guidance, follows the prompt. With a control image,
        the ControlNet runs here, and its residuals are returned too.

        Args:
            noisy: B Z 1 H W, H and W even.
            timesteps: B, 0..1000.
            t5: States of T5, B T text_dim.
            t5_mask: B T, 1 for real tokens, which come first; None if all are real. Chroma also keeps one
                padding token.
            pooled: State of CLIP-L, B pooled_dim; None for Chroma.
            guidance: B, not scaled; None is 0. Ignored by a model without guidance.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `t5`, `t5_mask` and `pooled`.
            references: Clean latents of images to edit (Kontext), each B Z 1 h w of its own size.
            control: Latents of a control image for the ControlNet, of the size of `noisy`.
            control_strength: Factor of the ControlNet's residuals.

        Raises:
            ValueError: If sizes do not match.
        """
        self._check([noisy, *references], t5, t5_mask)
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        latents = (noisy, *references)
        images = [run_in_weight_dtype(self.img_in, pack(image)).to(dtype) for image in latents]
        # rotary positions: the first axis numbers the image and its references
        grids = [
            TokenGrid(get_token_grid(image), first_position=index) for index, image in enumerate(latents)
        ]
        rotary = self._rotary.get_table(tuple(grids), noisy.device)
        # of the prompt and, if `overrides` have one, of the second text
        prompts = overrides.text_inputs(len(noisy), t5=t5, t5_mask=t5_mask, pooled=pooled)
        scale = torch.zeros_like(timesteps) if guidance is None else guidance
        is_chroma = self.config.approximator is not None
        shared_vector = self._compute_chroma_modulation(timesteps, scale) if is_chroma else None
        embedded_guidance = scale if self.config.has_guidance and overrides.embedded_guidance else None
        texts = []
        for prompt in prompts:
            text, lengths = self._embed_text(prompt["t5"], prompt["t5_mask"], len(rotary), dtype)
            vector = shared_vector
            if vector is None:
                vector = apply_silu(self._embed_vector(timesteps, prompt["pooled"], embedded_guidance), dtype)
            texts.append(EmbeddedText(text, lengths, vector))
        hidden = join_tokens(
            images,
            texts,
            overrides.combine_attention,
            grid=grids[0].sizes,
            rotary=rotary,
            dtype=dtype,
            attention=self.attention,
        )
        del images, texts  # their tokens were copied into `hidden`: free the originals for the ControlNet
        if control is not None and self.controlnet is not None:
            hidden.block_residuals = self.controlnet(
                noisy,
                timesteps,
                t5,
                pooled,
                guidance,
                control,
                control_strength,
            )
        return hidden

    def unembed(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        """Turn tokens B L+T C into the velocity, B Z 1 H W in float32."""
        _, rows, columns = tokens.grid
        return unpack(self.final_layer(x[:, : rows * columns], tokens).float(), rows, columns)

    def _compute_chroma_modulation(self, timesteps: Tensor, guidance: Tensor) -> Tensor:
        """Return the modulation rows of all blocks of Chroma, B 1 M C float32."""
        for modulation_rows in self._modulation_rows:
            modulation_rows.move_indices_to(timesteps.device)
        modulation: Tensor = self.distilled_guidance_layer(timesteps, guidance).unsqueeze(1)
        return modulation

    def _embed_vector(self, timesteps: Tensor, pooled: Tensor | None, guidance: Tensor | None) -> Tensor:
        """Embed timestep, pooled text and guidance as one vector, B 1 C float32; `guidance` may be None."""
        if pooled is None:
            raise ValueError("the model takes the pooled output of CLIP-L, but none is given")
        # angles in float32, as in training, although they are rounded for a large guidance
        vector = self.time_in(sinusoid(timesteps, self.config.freq_dim, torch.float32))
        vector = vector + self.vector_in(pooled)
        if guidance is not None:
            scaled = sinusoid(GUIDANCE_UNIT * guidance, self.config.freq_dim, torch.float32)
            vector = vector + self.guidance_in(scaled)
        return vector.unsqueeze(1)

    def _embed_text(
        self, t5: Tensor, mask: Tensor | None, num_image_tokens: int, dtype: torch.dtype
    ) -> tuple[Tensor, SampleLengths | None]:
        """Return text tokens, B T C, and sequence lengths including the image tokens in front."""
        if mask is None:
            return run_in_weight_dtype(self.txt_in, t5).to(dtype), None
        longest, counts = real_tokens(mask)
        if self.config.approximator is not None:  # Chroma was trained with one visible token of padding
            maximum = mask.shape[1]
            counts = None if counts is None else [min(count + 1, maximum) for count in counts]
            longest = min(longest + 1, maximum)
        lengths = None
        if counts is not None:
            lengths = make_lengths([num_image_tokens + count for count in counts], t5.device)
        return run_in_weight_dtype(self.txt_in, t5[:, :longest]).to(dtype), lengths

    def _check(self, images: Sequence[Tensor], t5: Tensor, mask: Tensor | None) -> None:
        for latents in images:
            channels, frames = latents.shape[1:3]
            height, width = latents.shape[-2:]
            if channels != self.config.channels:
                raise ValueError(f"{channels} input channels, the model takes {self.config.channels}")
            if frames != 1 or height % PATCH or width % PATCH:
                raise ValueError(f"latents of {tuple(latents.shape[2:])}: one frame of even height and width")
        if mask is not None and mask.shape != t5.shape[:2]:
            raise ValueError(f"a text mask of {tuple(mask.shape)} for text of {tuple(t5.shape[:2])}")


def get_token_grid(latents: Tensor) -> tuple[int, int, int]:
    """Return frames, rows and columns of the tokens of latents, B Z 1 H W."""
    return 1, latents.shape[-2] // PATCH, latents.shape[-1] // PATCH


def pack(latents: Tensor) -> Tensor:
    """Cut latents, B Z 1 H W, into tokens of 2 x 2 latent pixels: B L (Z ph pw)."""
    return rearrange(latents, "b z 1 (h ph) (w pw) -> b (h w) (z ph pw)", ph=PATCH, pw=PATCH)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `pack` for an image of `rows` x `columns` tokens."""
    return rearrange(
        tokens, "b (h w) (z ph pw) -> b z 1 (h ph) (w pw)", h=rows, w=columns, ph=PATCH, pw=PATCH
    )
