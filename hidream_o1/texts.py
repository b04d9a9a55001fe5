"""The texts of HiDream-O1-Image: token ids in a chat template, which the network itself embeds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from checkpoints.model_files import read_once
from checkpoints.opening import Checkpoint
from encoders.language_encoder import qwen3_chat, qwen_tokenizer
from encoders.text_encoder import FileTextEncoder, TemplatedPrompt, TextTokenizer, TokenizerSource
from hidream_o1.options import TOKENIZER_OPTION
from modules.errors import CaptionError, CheckpointError
from protocols.data import Conditions
from protocols.requests import Prompt

KEY = "hidream_o1_ids"  # token ids of a text, int64; the last one stands for the time
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
    keys = frozenset({KEY})
    variable_length = frozenset({KEY})
    description = "the text"
    source: TokenizerSource = SOURCE
    max_length = MAX_TOKENS
    logs_truncation = True

    @property
    def identity(self) -> Mapping[str, str]:
        """Fields of cache records: the tokenizer and the template. The weights do not matter."""
        return {
            f"{self.name}_tokenizer": self.source.identity(self.tokenizer, self.path),
            f"{self.name}_template": TEMPLATE,
        }

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
        for token in (IMAGE_TOKEN, TIME_TOKEN):
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

    def compute(
        self,
        network: nn.Module,
        tokenizer: TextTokenizer,
        token_ids: Sequence[list[int]],
        num_template_tokens: int,
    ) -> list[Conditions]:
        """Return the token ids of each prompt, L int64."""
        return [{KEY: [torch.tensor(ids)]} for ids in token_ids]


def _count_embeddings(checkpoint: Checkpoint) -> int:
    """Return the number of token embeddings in a transformer's file; 0 if it has none."""
    for name, info in checkpoint.tensors.items():
        if name.endswith(EMBEDDINGS):
            return info.shape[0]
    return 0
