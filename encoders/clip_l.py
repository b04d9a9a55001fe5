"""CLIP-L's text encoder for the shared loops: it turns each prompt into one vector.

A LoRA is applied to the linear layers of `encoder.layers` (72 in CLIP-L), which `ClipText.spec` names. In
LoRA files, `text_model.` precedes our module paths: `encoder.layers.0.self_attn.q_proj` is called
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
from encoders.clip_checkpoints import CLIP_END, CLIP_START, CLIP_TOKENS, ClipNaming, read_clip_text
from encoders.clip_layers import ClipText, load_clip_text
from encoders.text_encoder import (
    FileTextEncoder,
    TemplatedPrompt,
    TextTokenizer,
    TokenizerSource,
    fill_rows,
    find_merges,
)
from modules.devices import dtype_name
from protocols.data import Conditions
from protocols.family import EncoderAbilities
from protocols.requests import Prompt

logger = logging.getLogger(__name__)

CLIP_WORD_END = "</w>"  # ends the tokens at the end of a word
# How CLIP splits a text before byte pairs are merged. A tokenizer.json has this pattern, a vocab.json does
# not. Source: Radford et al. 2021, arXiv 2103.00020
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class ClipWords:
    """CLIP's tokenizer: `tokenize` converts text of any length to ids, without start and end token."""

    tokenize: Callable[[str], list[int]]
    start: int
    end: int
    token_text: Callable[[int], str]  # the text of a token; "" for ids of added words


def load_clip_words(files: TokenizerFiles, file: Path) -> ClipWords:
    """Load CLIP's tokenizer from `file`, without truncation.

    Raises:
        CheckpointError: If the file cannot be read, or if the tokenizer has no start or end token.
    """
    tokenizer = _read_clip(files, file)
    start, end = _find_start_and_end(tokenizer, files, file)

    def tokenize(text: str) -> list[int]:
        with files.convert_errors(file):
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def token_text(token: int) -> str:
        return (tokenizer.id_to_token(token) or "").removesuffix(CLIP_WORD_END)

    return ClipWords(tokenize, start, end, token_text)


def _find_start_and_end(tokenizer: Tokenizer, files: TokenizerFiles, file: Path) -> tuple[int, int]:
    """Return the ids of the start and end tokens."""
    start = tokenizer.token_to_id(CLIP_START)
    end = tokenizer.token_to_id(CLIP_END)
    if start is None or end is None:
        raise files.unreadable(file, ValueError(f"it has no {CLIP_START} or no {CLIP_END}"))
    return start, end


def _read_clip(files: TokenizerFiles, file: Path) -> Tokenizer:
    """Read tokenizer.json, or build the same tokenizer from vocab.json and merges.txt."""
    merges = find_merges(file)
    # tokenizer.json contains everything
    if merges is None:
        return files.read(file)
    for part in (file, merges):
        files.check_bytes(part)
    with files.convert_errors(file):
        model = models.BPE.from_file(
            str(file), str(merges), unk_token=CLIP_END, end_of_word_suffix=CLIP_WORD_END
        )
    tokenizer = Tokenizer(model)
    # vocab.json and merges.txt lack these settings, which a tokenizer.json contains
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    start, end = _find_start_and_end(tokenizer, files, file)
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_END, end),
        (CLIP_START, start),
        trim_offsets=False,
        add_prefix_space=False,
    )
    tokenizer.add_special_tokens([CLIP_START, CLIP_END])
    return tokenizer


# Letters: C = width of the model


LORA_PREFIX = "lora_te1"  # prefix of names in LoRA files
CLIP_L = ClipNaming()


class PooledClip(FileTextEncoder[ClipText]):
    """CLIP-L with one vector per prompt, computed from the second prompt (--prompt_2) if it is given.

    Prompt weights have no effect, because the vector is the state of the end token.
    """

    abilities = EncoderAbilities(accepts_new_words=True)
    max_length = CLIP_TOKENS
    embedding = "embeddings.token_embedding.weight"
    word_keys = ("clip_l",)

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float16,
        tokenizer: Path | None = None,
        naming: ClipNaming = CLIP_L,
    ) -> None:
        """Set up the encoder; files are read by `load`.

        Args:
            path: File or folder of the model, or of a release with it in its subfolder `naming.folder`.
            dtype: Compute dtype.
            tokenizer: Value of the tokenizer's option; None searches near the model.
            naming: The family's names for the encoder in options, caches and conditions.
        """
        super().__init__(inside(path, naming.folder), tokenizer)
        self.name = naming.name
        self.keys = naming.keys
        self.description = naming.description
        self.source = TokenizerSource(naming.tokenizer, read_file=_read_clip)
        self.naming = naming
        self.dtype = dtype

    @property
    def identity(self) -> Mapping[str, str]:
        """Fields of cache records: everything that the vector depends on except the text."""
        with open_checkpoint(self.path) as checkpoint:
            config = read_clip_text(checkpoint, self.naming).config
        settings = f"{config.num_heads} heads, {config.activation}, eps {config.eps}"
        return self.identify(self.naming.name, config=settings, dtype=dtype_name(self.dtype))

    def apply_template(self, prompt: Prompt) -> TemplatedPrompt:
        """Return `prompt_2`, or the prompt if it has none, without prompt weights."""
        text = prompt.text if prompt.prompt_2 is None else prompt.prompt_2
        return TemplatedPrompt(text, text, ())

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raise CheckpointError unless the tokenizer adds a start and an end token to a text."""
        empty_ids = tokenizer.read("").ids
        if len(empty_ids) != 2 or empty_ids[1] != tokenizer.token_to_id(CLIP_END):
            why = ValueError(f"it does not put a text between {CLIP_START} and {CLIP_END}")
            raise self.source.files.unreadable(tokenizer.file, why)

    def load_network(self, device: torch.device) -> ClipText:
        """Load the text tower and log its file and dtype."""
        clip = load_clip_text(self.path, device, self.dtype, self.naming)
        logger.info("%s: %s, computing in %s", self.description, self.path, dtype_name(self.dtype))
        return clip

    def compute(
        self,
        network: ClipText,
        tokenizer: TextTokenizer,
        token_ids: Sequence[list[int]],
        num_template_tokens: int,
    ) -> list[Conditions]:
        """Return each prompt's pooled state, C, and, if the family uses one, its mask, 77 int64."""
        end = tokenizer.token_to_id(CLIP_END)
        assert end is not None  # checked when the tokenizer was loaded
        ids, masks = fill_rows(token_ids, CLIP_TOKENS, end)  # CLIP pads with its end token
        # the pooled state is the first end token's
        ends = torch.tensor([prompt_ids.index(end) for prompt_ids in token_ids])
        pooled = network(ids.to(network.device), ends.to(network.device)).cpu()
        results: list[Conditions] = []
        for state, mask in zip(pooled, masks, strict=True):
            conditions = {self.naming.pooled_key: state.clone()}
            if self.naming.mask_key is not None:
                conditions[self.naming.mask_key] = mask.clone()
            results.append(conditions)
        return results


class ClipTextEncoder(PooledClip):
    """CLIP-L text encoder that supports LoRA training."""

    abilities = EncoderAbilities(trainable=True, accepts_new_words=True)
    lora_prefix = LORA_PREFIX
