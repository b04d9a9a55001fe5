"""CLIP-L's text encoder, as the shared loops use it: each prompt gives one vector.

A LoRA goes into the linear layers of `encoder.layers` (72 in CLIP-L): `ClipText.spec` names them. In LoRA
files our module paths have `text_model.` in front: that of `encoder.layers.0.self_attn.q_proj` is
`lora_te1_text_model_encoder_layers_0_self_attn_q_proj`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from checkpoints.model_files import inside
from checkpoints.opening import open_checkpoint
from checkpoints.tokenizers import TokenizerFiles
from encoders.clip_checkpoints import CLIP_END, CLIP_START, CLIP_TOKENS, ClipUse, read_clip_text
from encoders.clip_layers import ClipText, load_clip_text
from encoders.text_encoder import (
    FileTextEncoder,
    TextTokenizer,
    TokenizerSource,
    Written,
    fill_rows,
    find_merges,
)
from modules.devices import dtype_name
from protocols.data import Conditions
from protocols.family import EncoderAbilities
from protocols.requests import Prompt

logger = logging.getLogger(__name__)

# how CLIP splits a text before merging, for files other than tokenizer.json, which states it. Source: Radford
# et al. 2021, arXiv 2103.00020
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class ClipWords:
    """CLIP's tokenizer: `tokenize` turns text of any length into ids, without start and end token."""

    tokenize: Callable[[str], list[int]]
    start: int
    end: int


def load_clip_words(files: TokenizerFiles, file: Path) -> ClipWords:
    """Load CLIP's tokenizer from a file that was found, without truncation.

    Raises:
        CheckpointError: If it cannot be read or has no start or end token.
    """
    tokenizer = _read_clip(files, file)
    start, end = _start_and_end(tokenizer, files, file)

    def tokenize(text: str) -> list[int]:
        with files.explain(file):
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return ClipWords(tokenize, start, end)


def _start_and_end(tokenizer: Tokenizer, files: TokenizerFiles, file: Path) -> tuple[int, int]:
    """Return the ids of the tokens around a text.

    Raises:
        CheckpointError: If the tokenizer lacks one.
    """
    start = tokenizer.token_to_id(CLIP_START)
    end = tokenizer.token_to_id(CLIP_END)
    if start is None or end is None:
        raise files.unreadable(file, ValueError(f"it has no {CLIP_START} or no {CLIP_END}"))
    return start, end


def _read_clip(files: TokenizerFiles, file: Path) -> Tokenizer:
    """Read tokenizer.json, or build the same tokenizer from vocab.json and merges.txt."""
    merges = find_merges(file)
    if merges is None:
        return files.read(file)
    for part in (file, merges):
        files.check_bytes(part)
    with files.explain(file):
        model = models.BPE.from_file(str(file), str(merges), unk_token=CLIP_END, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    start, end = _start_and_end(tokenizer, files, file)
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_END, end),
        (CLIP_START, start),
        trim_offsets=False,
        add_prefix_space=False,
    )
    tokenizer.add_special_tokens([CLIP_START, CLIP_END])
    return tokenizer


# Letters: C = width of the model


LORA_PREFIX = "lora_te1"  # of names in LoRA files
CLIP_L = ClipUse()


class PooledClip(FileTextEncoder[ClipText]):
    """CLIP-L, which gives one vector per prompt, computed from the second text if there is one (--prompt_2).

    Weights of parts of a prompt have no effect, because the vector is the state of the end token.
    """

    can = EncoderAbilities(take_words=True)
    maximum = CLIP_TOKENS
    embedding = "embeddings.token_embedding.weight"
    word_keys = ("clip_l",)

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float16,
        tokenizer: Path | None = None,
        use: ClipUse = CLIP_L,
    ) -> None:
        """Set up the encoder; files are read by `load`.

        Args:
            path: File or folder of the model, or of a release that holds it in its subfolder `use.folder`.
            dtype: Compute dtype.
            tokenizer: Path from the tokenizer's option; None searches the usual places.
            use: How the family uses and names the encoder.
        """
        super().__init__(inside(path, use.folder), tokenizer)
        self.name = use.name
        self.keys = use.keys
        self.what = use.what
        self.source = TokenizerSource(use.tokenizer, read_file=_read_clip)
        self.use = use
        self.dtype = dtype

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything besides the text that the vector depends on: settings of the network and the dtype."""
        with open_checkpoint(self.path) as checkpoint:
            config = read_clip_text(checkpoint, self.use).config
        settings = f"{config.num_heads} heads, {config.activation}, eps {config.eps}"
        return self.identify(self.use.name, config=settings, dtype=dtype_name(self.dtype))

    def write(self, prompt: Prompt) -> Written:
        """Return the second text unchanged, or the prompt's only text; weights of its parts are dropped."""
        text = prompt.text if prompt.second is None else prompt.second
        return Written(text, text, ())

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raise CheckpointError unless it puts a text between two tokens."""
        around = tokenizer.read("").ids
        if len(around) != 2 or around[1] != tokenizer.number(CLIP_END):
            why = ValueError(f"it does not put a text between {CLIP_START} and {CLIP_END}")
            raise self.source.files.unreadable(tokenizer.file, why)

    def load_network(self, device: torch.device) -> ClipText:
        """Load the text tower and log its file and dtype."""
        clip = load_clip_text(self.path, device, self.dtype, self.use)
        logger.info("%s: %s, computing in %s", self.what, self.path, dtype_name(self.dtype))
        return clip

    def compute(
        self, network: ClipText, tokenizer: TextTokenizer, rows: Sequence[list[int]], dropped: int
    ) -> list[Conditions]:
        """Return each prompt's pooled state, C, and its mask if the family stores one: 77 int64, 1 = real."""
        end = tokenizer.number(CLIP_END)
        assert end is not None  # checked when the tokenizer was loaded
        ids, masks = fill_rows(rows, CLIP_TOKENS, end)
        ends = torch.tensor([row.index(end) for row in rows])
        pooled = network(ids.to(network.device), ends.to(network.device)).cpu()
        results: list[Conditions] = []
        for state, mask in zip(pooled, masks, strict=True):
            conditions = {self.use.pooled: state.clone()}
            if self.use.mask is not None:
                conditions[self.use.mask] = mask.clone()
            results.append(conditions)
        return results


class ClipTextEncoder(PooledClip):
    """CLIP-L, into which a LoRA can be put."""

    can = EncoderAbilities(learn=True, take_words=True)
    lora_prefix = LORA_PREFIX
