"""CLIP-L's text encoder, as the shared loops use it: each prompt gives one vector.

A LoRA goes into the linear layers of `encoder.layers` (72 in CLIP-L): `ClipText.spec` names them. In LoRA
files our module paths have `text_model.` in front: that of `encoder.layers.0.self_attn.q_proj` is
`lora_te1_text_model_encoder_layers_0_self_attn_q_proj`.
"""
# Letters: C = width of the model

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from encoders.clip_checkpoints import CLIP_TOKENS, ClipUse, read_clip_text
from encoders.clip_text import ClipText, load_clip_text
from encoders.clip_tokenizer import (
    ClipTokenizer,
    clip_tokenizer_identity,
    load_clip_ends,
    load_clip_tokenizer,
)
from encoders.token_rows import check_ids, fill_rows
from modules.checkpoints.model_files import inside
from modules.checkpoints.opening import fingerprint, open_checkpoint
from modules.contract.data import Conditions
from modules.contract.requests import Prompt
from modules.contract.rules import CountTokens, TokenCount, kept_characters
from modules.devices import dtype_name
from modules.offload.loaded import LoadedNetwork

logger = logging.getLogger(__name__)

LORA_PREFIX = "lora_te1"  # of names in LoRA files
CLIP_L = ClipUse()


class ClipTextEncoder:
    """CLIP-L. Each prompt gives one vector, of its second text if it has one (--prompt_2).

    Weights of a prompt's parts do not count: the vector is the state of the text's end, not of its tokens.
    """

    variable_length: frozenset[str] = frozenset()
    lora_prefix = LORA_PREFIX

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float16,
        tokenizer: Path | None = None,
        use: ClipUse = CLIP_L,
    ) -> None:
        """Set up the encoder; `load` reads the files. dtype: compute dtype. use: the family's names for it.

        path: file or folder of the model, or a release's folder that holds it as `use.folder`.
        """
        self.path = inside(path, use.folder)
        self.dtype = dtype
        self.tokenizer = tokenizer
        self.use = use
        self._loaded = LoadedNetwork[ClipText, ClipTokenizer]()

    @property
    def name(self) -> str:
        """The name in messages and cache records."""
        return self.use.name

    @property
    def keys(self) -> frozenset[str]:
        """Return the keys of the result of `encode`."""
        return self.use.keys

    @property
    def network(self) -> ClipText:
        """The network. Call `load` first."""
        return self._loaded.get()[0]

    @property
    def identity(self) -> Mapping[str, str]:
        """Return fingerprints of checkpoint and tokenizer, config.json's values and the dtype.

        Reads a few MB.
        Raises CheckpointError if the file holds another model.
        """
        with open_checkpoint(self.path) as checkpoint:
            config = read_clip_text(checkpoint, self.use).config
        return {
            self.name: fingerprint(self.path),
            f"{self.name}_config": f"{config.num_heads} heads, {config.activation}, eps {config.eps}",
            f"{self.name}_tokenizer": clip_tokenizer_identity(self.use.tokenizer, self.tokenizer, self.path),
            f"{self.name}_dtype": dtype_name(self.dtype),
        }

    def token_counter(self) -> CountTokens:
        """Return a function that counts a text's tokens with the start and the end token.

        Only the tokenizer is loaded. Raises CheckpointError if there is none here; none is downloaded.
        """
        find_ends = load_clip_ends(self.use.tokenizer, self.tokenizer, self.path)

        def count(text: str) -> TokenCount:
            ends = find_ends(text)
            kept = kept_characters(ends, CLIP_TOKENS - 2, len(text))
            return TokenCount(text, len(ends) + 2, CLIP_TOKENS, kept)

        return count

    def load(self, device: torch.device) -> None:
        """Load encoder and tokenizer. If they are loaded already, move the encoder to the device."""
        self._loaded.load(device, self._read)

    def _read(self, device: torch.device) -> tuple[ClipText, ClipTokenizer]:
        tokenizer = load_clip_tokenizer(self.use.tokenizer, self.tokenizer, self.path)
        clip = load_clip_text(self.path, device, self.dtype, self.use)
        logger.info("%s: %s, computing in %s", self.use.what, self.path, dtype_name(self.dtype))
        return clip, tokenizer

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return each prompt's pooled state C and, if it has a key, its mask: 77 int64, 1 for real tokens.

        They are on the CPU; gradients flow to trained parts of the network. Raises CheckpointError if the
        tokenizer has more tokens than the model.
        """
        clip, tokenizer = self._loaded.get()
        rows = [
            tokenizer.tokenize(prompt.text if prompt.second is None else prompt.second) for prompt in prompts
        ]
        if not rows:
            return []
        ids, mask = fill_rows(rows, CLIP_TOKENS, tokenizer.end)
        check_ids(rows, clip.embeddings.token_embedding.num_embeddings, self.path, self.use.tokenizer.option)
        ends = torch.tensor([row.index(tokenizer.end) for row in rows])
        pooled = clip(ids.to(clip.device), ends.to(clip.device)).cpu()
        return [
            {self.use.pooled: state.clone()}
            | ({} if self.use.mask is None else {self.use.mask: real.clone()})
            for state, real in zip(pooled, mask, strict=True)
        ]

    def free(self) -> None:
        """Release the encoder and its memory."""
        self._loaded.free()
