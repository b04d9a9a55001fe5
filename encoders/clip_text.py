"""CLIP's text tower: turn each prompt into the state of its end token, and into states of all its tokens.

Module names follow Hugging Face's files. Source: Radford et al. 2021, arXiv 2103.00020.
"""
# Letters: B prompts, L tokens, C width

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from encoders.clip_checkpoints import ClipTextConfig, ClipUse, read_clip_text
from encoders.clip_layers import ClipLayers, check_activation
from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.contract.family import DitSpec
from modules.contract.steps import Tweaks
from modules.run_blocks import Hidden, run_blocks


class ClipTextEmbeddings(nn.Module):
    """Sum of token and position embeddings."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.dim)
        self.position_embedding = nn.Embedding(config.positions, config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class ClipText(nn.Module):
    """The text tower without its projection."""

    spec = DitSpec(block_lists=("encoder.layers",))

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = ClipTextEmbeddings(config)
        self.encoder = ClipLayers(config, is_causal=True)
        self.final_layer_norm = nn.LayerNorm(config.dim, config.eps)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.final_layer_norm.weight.device

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self.encoder.layers)

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Return the pooled state B C. ids: B L. ends: B, position of the first end token of each prompt.

        Attention is causal, so padding after the end token changes nothing.
        """
        hidden = Hidden(self.embeddings(ids), None)
        self._run(hidden, range(self.num_layers))
        return self._pool(hidden.x, ends)

    def states(
        self, ids: Tensor, layer: int = 1, *, final_norm: bool = False, ends: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the states of all tokens B L C after a layer and, if `ends` is given, the pooled state B C.

        ids: B L. layer: counted from the end, 1 to `num_layers`; 1 is the last. Transformers call the
        result `hidden_states[-layer]`. final_norm: apply the tower's last norm to it. ends: as for
        `forward`; without it the layers behind `layer` do not run. One pass in either case.

        Raises ValueError if the layer does not exist.
        """
        if not 1 <= layer <= self.num_layers:
            raise ValueError(f"layer {layer} from the end of {self.num_layers}")
        last = self.num_layers - layer + 1
        hidden = Hidden(self.embeddings(ids), None)
        self._run(hidden, range(last))
        states = self.final_layer_norm(hidden.x) if final_norm else hidden.x
        if ends is None:
            return states, None
        self._run(hidden, range(last, self.num_layers))
        return states, self._pool(hidden.x, ends)

    def _run(self, hidden: Hidden, layers: Iterable[int]) -> None:
        run_blocks(self, hidden, Tweaks(skip_blocks=frozenset(range(self.num_layers)).difference(layers)))

    def _pool(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return the normed states B C of the end tokens. x: B L C after the last layer."""
        return self.final_layer_norm(x[torch.arange(len(x), device=x.device), ends])


def load_clip_text(path: Path, device: torch.device, dtype: torch.dtype, use: ClipUse) -> ClipText:
    """Load the text tower; fp8 weights are dequantized. use: names it in messages.

    Raises CheckpointError if the file is damaged or holds another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_clip_text(checkpoint, use)
        check_activation(plan.config, path, "CLIP-L has quick_gelu")
        return load_planned(plan, ClipText, device, dtype, f"the CLIP text encoder ({use.option})")
