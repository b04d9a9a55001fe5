"""CLIP-L's text encoder, as the shared loops use it: each prompt gives one vector.

A LoRA goes into the linear layers of `encoder.layers` (72 in CLIP-L): `ClipText.spec` names them. In LoRA
files our module paths have `text_model.` in front: that of `encoder.layers.0.self_attn.q_proj` is
`lora_te1_text_model_encoder_layers_0_self_attn_q_proj`.

Its tokenizer follows its files exactly: tokenizer.json is read directly, for the classes that transformers
choose by name rebuild some tokenizers with other rules.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from encoders.clip_checkpoints import CLIP_END, CLIP_START, CLIP_TOKENS, ClipUse, read_clip_text
from encoders.clip_layers import ClipText, load_clip_text
from encoders.piece_tokenizers import check_ids, fill_rows
from modules.checkpoints.model_files import inside
from modules.checkpoints.opening import fingerprint, open_checkpoint
from modules.checkpoints.tokenizers import TokenizerFiles
from modules.contract.data import Conditions
from modules.contract.requests import Prompt
from modules.contract.rules import CountTokens, TokenCount, kept_characters
from modules.devices import dtype_name
from modules.offload.host_memory import LoadedNetwork

logger = logging.getLogger(__name__)

# how CLIP splits a text before merging, for files other than tokenizer.json, which states it. Source: Radford
# et al. 2021, arXiv 2103.00020
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class ClipTokenizer:
    """Turn text into at most 77 token ids, with a start and an end token."""

    tokenize: Callable[[str], list[int]]
    end: int


def clip_tokenizer_identity(files: TokenizerFiles, path: Path | None, encoder: Path) -> str:
    """Return the tokenizer's identity for cache records.

    files: where it may be. path: of its option; None looks for it.
    """
    file = files.find(path, encoder)
    merges = None if file is None else _merges_of(file)
    return files.identity(file) + ("" if merges is None else files.identity(merges))


def load_clip_ends(files: TokenizerFiles, path: Path | None, encoder: Path) -> Callable[[str], list[int]]:
    """Return a function: text -> the end of each token in it, however many, without those around a text.

    files, path: as for `load_clip_tokenizer`.

    Raises CheckpointError if there is none here or it cannot be read; none is downloaded.
    """
    tokenizer = _read_clip(files, files.find(path, encoder) or files.require_local(encoder))
    return lambda text: [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]


def load_clip_tokenizer(files: TokenizerFiles, path: Path | None, encoder: Path) -> ClipTokenizer:
    """Load CLIP's tokenizer from tokenizer.json, or from vocab.json with merges.txt.

    files: where it may be. path: of its option; None looks for it beside the encoder, then on the hub.
    Raises CheckpointError if there is none or it cannot be read.
    """
    file = files.find(path, encoder) or files.download(encoder)
    logger.info("tokenizer of CLIP-L: %s", file)
    tokenizer = _read_clip(files, file)
    tokenizer.enable_truncation(CLIP_TOKENS)
    around = tokenizer.encode("").ids
    if len(around) != 2 or around[1] != tokenizer.token_to_id(CLIP_END):
        raise files.unreadable(
            file, ValueError(f"it does not put a text between {CLIP_START} and {CLIP_END}")
        )

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    return ClipTokenizer(tokenize, around[1])


@dataclass(frozen=True)
class ClipWords:
    """Turn text into token ids, however many, without start and end; and the ids of those."""

    tokenize: Callable[[str], list[int]]
    start: int
    end: int


def load_clip_words(files: TokenizerFiles, file: Path) -> ClipWords:
    """Load CLIP's tokenizer from a file that was found, without truncation.

    Raises CheckpointError if it cannot be read or has no start or end token.
    """
    tokenizer = _read_clip(files, file)
    start, end = (tokenizer.token_to_id(token) for token in (CLIP_START, CLIP_END))
    if start is None or end is None:
        raise files.unreadable(file, ValueError(f"it has no {CLIP_START} or no {CLIP_END}"))

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return ClipWords(tokenize, start, end)


def _read_clip(files: TokenizerFiles, file: Path) -> Tokenizer:
    """Read tokenizer.json, or vocab.json with merges.txt."""
    merges = _merges_of(file)
    return files.read(file) if merges is None else _from_merges(files, file, merges)


def _merges_of(file: Path) -> Path | None:
    """Return the second file of a tokenizer in the form of CLIP's release, or None for a tokenizer.json."""
    return file.with_name("merges.txt") if file.name == "vocab.json" else None


def _from_merges(files: TokenizerFiles, vocabulary: Path, merges: Path) -> Tokenizer:
    for file in (vocabulary, merges):
        files.check_bytes(file)
    try:
        model = models.BPE.from_file(
            str(vocabulary), str(merges), unk_token=CLIP_END, end_of_word_suffix="</w>"
        )
    except Exception as error:  # the library raises nothing more precise
        raise files.unreadable(vocabulary, error) from error
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
    start, end = (tokenizer.token_to_id(token) for token in (CLIP_START, CLIP_END))
    if start is None or end is None:
        raise files.unreadable(vocabulary, ValueError(f"it has no {CLIP_START} or no {CLIP_END}"))
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_END, end), (CLIP_START, start), False, False
    )
    tokenizer.add_special_tokens([CLIP_START, CLIP_END])
    return tokenizer


# Letters: C = width of the model


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
