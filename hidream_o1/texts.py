"""The texts of HiDream-O1-Image: token ids in a chat template, which the network itself embeds.

Small copies of references stand in front of a text, as images in a message to Qwen3-VL.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from checkpoints.model_files import read_once
from checkpoints.opening import Checkpoint
from encoders.language_encoder import qwen3_chat, qwen_tokenizer
from encoders.text_encoder import FileTextEncoder, TemplatedPrompt, TextTokenizer, TokenizerSource
from hidream_o1.options import TOKENIZER_OPTION
from hidream_o1.references import SHOWN_SIDES, SHOWN_STEP, cut_tokens, shrink_for_tower
from modules.errors import CaptionError, CheckpointError
from modules.media.reading import Frame
from protocols.data import Conditions
from protocols.requests import Prompt

# token ids of a text, int64; the last one stands for the time, REFERENCE_ID for tokens of references
KEY = "hidream_o1_ids"
# with references: the pixels of their tokens, n K uint8, and rows and columns of tokens of each, R 2 int64
SHOWN_KEY, GRIDS_KEY = "hidream_o1_shown", "hidream_o1_grids"
REFERENCE_ID = -1  # in place of the placeholder's id, so that the network need not know it
PLACEHOLDER = "<|image_pad|>"
BEFORE_REFERENCE, AFTER_REFERENCE = "<|vision_start|>", "<|vision_end|>"
IMAGE_TOKEN, TIME_TOKEN = "<|boi_token|>", "<|tms_token|>"
EMBEDDINGS = "language_model.embed_tokens.weight"
MAX_TOKENS = 2048  # of a prompt with its template; longer ones are cut off. The image begins at position 4096
_BEFORE, _AFTER = qwen3_chat(thinks=True)
TEMPLATE = f"{_BEFORE}{{}}{_AFTER}{IMAGE_TOKEN}{TIME_TOKEN}"
_QWEN = qwen_tokenizer(TOKENIZER_OPTION, "HiDream-ai/HiDream-O1-Image")
SOURCE = replace(
    _QWEN,
    files=replace(
        _QWEN.files,
        names=("tokenizer.json",),  # a vocab.json lacks the tokens of this model
        folder="",
        folders=(".", "hidream_o1", "tokenizer"),
        unique_token=TIME_TOKEN,
    ),
)


class HiDreamO1Tokenizer(FileTextEncoder[nn.Module]):
    """Text encoder that returns the ids of a prompt's tokens; its network has no weights."""

    name = "hidream_o1_text"
    description = "the text"
    source: TokenizerSource = SOURCE
    max_length = MAX_TOKENS
    logs_truncation = True

    def __init__(self, path: Path, tokenizer: Path | None = None, takes_references: bool = False) -> None:
        """Set up the encoder; files are read by `load`.

        Args:
            path: File or folder of the network.
            tokenizer: Value of --tokenizer; None searches near the network.
            takes_references: Whether texts may have references, whose pixels are then returned too.
        """
        super().__init__(path, tokenizer)
        self.keys = frozenset({KEY, SHOWN_KEY, GRIDS_KEY} if takes_references else {KEY})
        self.variable_length = self.keys
        self.takes_references = takes_references

    @property
    def identity(self) -> Mapping[str, str]:
        """Fields of cache records: the tokenizer, the template and sizes. The weights do not matter."""
        identity = {
            f"{self.name}_tokenizer": self.source.identity(self.tokenizer, self.path),
            f"{self.name}_template": TEMPLATE,
        }
        if self.takes_references:
            identity[f"{self.name}_references"] = " ".join(f"{most}: {side}" for most, side in SHOWN_SIDES)
        return identity

    @property
    def token_bytes(self) -> int:
        """Size in bytes of one token's id."""
        return torch.int64.itemsize

    def apply_template(self, prompt: Prompt) -> TemplatedPrompt:
        """Insert a prompt into the template; an empty one is a space, as in the released code.

        Raises:
            CaptionError: If the prompt contains a token that ends the text, or has weights.
        """
        if prompt.weighted_spans:
            raise CaptionError(
                f"tokens have no weights in this model. Remove them from the prompt: {prompt.text}"
            )
        text = prompt.text or " "
        for token in (IMAGE_TOKEN, TIME_TOKEN):
            if token in text:
                raise CaptionError(f"{token} ends a text for this model. Remove it from the prompt: {text}")
        before, after = TEMPLATE.split("{}")
        end = len(before) + len(text)
        return TemplatedPrompt(
            f"{before}{text}{after}", text, prompt.weighted_spans, len(before), suffix_start=end
        )

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raise CheckpointError if the tokenizer lacks the tokens that end a text."""
        for token in (IMAGE_TOKEN, TIME_TOKEN, *[PLACEHOLDER] * self.takes_references):
            if tokenizer.token_to_id(token) is None:
                raise CheckpointError(
                    f"{tokenizer.file}: the tokenizer has no {token}, so it is not HiDream-O1-Image's. Pass "
                    f"the tokenizer.json of HiDream-ai/HiDream-O1-Image to {TOKENIZER_OPTION}.",
                    tokenizer.file,
                )

    def load_network(self, device: torch.device) -> nn.Module:
        """Return embeddings of width 0, whose number limits the ids; the transformer has the real ones."""
        count = read_once(self.path, _count_embeddings)
        return nn.ModuleDict({"embed_tokens": nn.Embedding(count, 0, device=device)})

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return the token ids of each prompt and, if the encoder takes references, their pixels and grids.

        Raises:
            CaptionError: If a text contains a token that ends it or stands for an image, or has weights.
            MediaError: If a reference cannot be read.
        """
        if not self.takes_references:
            return super().encode(prompts)
        templated, shown = [], []
        for prompt in prompts:
            frames = [frame.numpy()[..., :3] for frame in prompt.image_pixels]  # already decoded
            frames = frames or [reference.read() for reference in prompt.media_before_text]
            copies = [shrink_for_tower(frame, len(frames)) for frame in frames]
            templated.append(self._place(self.apply_template(prompt), copies))
            shown.append(copies)
        return self.encode_templated(templated, functools.partial(self.compute, shown=shown))

    def _place(self, prompt: TemplatedPrompt, copies: Sequence[Frame]) -> TemplatedPrompt:
        """Return a prompt with the placeholders of small copies, H W 3 each, in front of its text."""
        if not copies:
            return prompt
        if PLACEHOLDER in prompt.prompt:
            raise CaptionError(
                f"{PLACEHOLDER} stands for a reference. Remove it from the prompt: {prompt.prompt}"
            )
        counts = [len(cut_tokens(copy)) for copy in copies]
        inserted = "".join(f"{BEFORE_REFERENCE}{PLACEHOLDER * count}{AFTER_REFERENCE}" for count in counts)
        return prompt._replace(
            text=prompt.text[: prompt.start] + inserted + prompt.text[prompt.start :],
            start=prompt.start + len(inserted),
            suffix_start=prompt.suffix_start + len(inserted),
            num_image_tokens=sum(counts) + 2 * len(counts),
        )

    def compute(
        self,
        network: nn.Module,
        tokenizer: TextTokenizer,
        token_ids: Sequence[list[int]],
        num_template_tokens: int,
        shown: Sequence[Sequence[Frame]] = (),
    ) -> list[Conditions]:
        """Return the token ids of each prompt, L int64, and what `shown`, its references' copies, becomes."""
        if not self.takes_references:
            return [{KEY: [torch.tensor(ids)]} for ids in token_ids]
        placeholder = tokenizer.token_to_id(PLACEHOLDER)
        results: list[Conditions] = []
        for ids, copies in zip(token_ids, shown, strict=True):
            text = torch.tensor(ids)
            # without references, a placeholder is a word of the text
            tokens = [torch.zeros(0, 3 * SHOWN_STEP**2, dtype=torch.uint8), *map(cut_tokens, copies)]
            if copies:
                text[text == placeholder] = REFERENCE_ID
            grids = [(copy.shape[0] // SHOWN_STEP, copy.shape[1] // SHOWN_STEP) for copy in copies]
            results.append(
                {
                    KEY: [text],
                    SHOWN_KEY: [torch.cat(tokens)],
                    GRIDS_KEY: [torch.tensor(grids, dtype=torch.int64).view(-1, 2)],
                }
            )
        return results


def _count_embeddings(checkpoint: Checkpoint) -> int:
    """Return the number of token embeddings in a transformer's file; 0 if it has none."""
    for name, info in checkpoint.tensors.items():
        if name.endswith(EMBEDDINGS):
            return info.shape[0]
    return 0
