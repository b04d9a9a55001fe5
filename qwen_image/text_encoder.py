"""Qwen-Image's text encoder, as the shared loops use it: Qwen2.5-VL's last state, normed, of a prompt.

Template and lengths are those of the release; the name of the output is that of the known caches.
"""
# Letters: L tokens, C = width of the model

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from encoders.text_encoder import FileTextEncoder, TextTokenizer, Written
from hunyuan_image.text_encoders import BEFORE, CPU, DROPPED, QWEN, TOKENIZER
from hunyuan_model.llama import Llama, load_llama
from hunyuan_model.text_checkpoints import LlamaConfig, read_llama
from hunyuan_model.text_encoders import warn_of_other_template
from modules.checkpoints.model_files import inside
from modules.checkpoints.opening import Checkpoint, open_checkpoint
from modules.contract.data import Conditions
from modules.contract.requests import Prompt
from modules.devices import dtype_name

logger = logging.getLogger(__name__)

KEY = "vl_embed"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
MOST = 1024  # tokens of a prompt, with those of the template behind it


class QwenImageTextEncoder(FileTextEncoder[Llama]):
    """The language model of Qwen2.5-VL. Each prompt gives a state for each of its tokens."""

    name = "vl"
    keys = frozenset({KEY})
    variable_length = keys
    source = TOKENIZER
    most = MOST
    weighed = KEY
    tells_cuts = True

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.bfloat16,
        tokenizer: Path | None = None,
        in_fp8: bool = False,
        on_cpu: bool = False,
    ) -> None:
        """Set up the encoder; `load` reads the files.

        path: file or folder of the model, or a release's folder that holds it as `text_encoder`. dtype:
        compute dtype. in_fp8: keep the linear layers in 8 bits. on_cpu: compute there, whatever the device.
        """
        super().__init__(inside(path, "text_encoder"), tokenizer)
        self.dtype = dtype
        self.in_fp8 = in_fp8
        self.on_cpu = on_cpu

    @property
    def identity(self) -> Mapping[str, str]:
        """Return fingerprints of checkpoint and tokenizer, config.json's values and the options used."""
        with open_checkpoint(self.path) as checkpoint:
            config = read_qwen(checkpoint)
        return self.identify(
            self.name,
            config=f"{config.num_heads} heads, theta {config.theta}, eps {config.eps}",
            dtype=dtype_name(self.dtype),
            template="text",
            weights="fp8" if self.in_fp8 else None,
        )

    def write(self, prompt: Prompt) -> Written:
        """Return the prompt in its template."""
        return Written(prompt.text, prompt.spans, BEFORE, AFTER)

    def count_dropped(self, tokenizer: TextTokenizer) -> int:
        """Return the number of tokens before the prompt, as of the model's own tokenizer."""
        return DROPPED

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Warn if the tokenizer makes another number of tokens of the template."""
        warn_of_other_template(len(tokenizer.read(BEFORE).ids), DROPPED, self.source.files.option)

    def load(self, device: torch.device) -> None:
        """Load encoder and tokenizer. If they are loaded already, move the encoder to the device."""
        super().load(CPU if self.on_cpu else device)

    def load_network(self, device: torch.device) -> Llama:
        """Load the language model."""
        network = load_llama(self.path, device, self.dtype, 0, True, self.in_fp8, QWEN)
        logger.info("text encoder: %s, computing in %s", self.path, dtype_name(self.dtype))
        return network

    def compute(
        self, network: Llama, tokenizer: TextTokenizer, rows: Sequence[list[int]], dropped: int
    ) -> list[Conditions]:
        """Return {"vl_embed": [L C]} for each prompt, one at a time.

        L: number of the prompt's tokens and of those behind it.
        """
        results: list[Conditions] = []
        for row in rows:
            ids = torch.tensor([row])
            states = network(ids.to(network.device), torch.ones_like(ids).to(network.device))
            results.append({KEY: [states[0, dropped:].cpu().clone()]})
        return results


def read_qwen(checkpoint: Checkpoint) -> LlamaConfig:
    """Read the dimensions of the language model in an open file.

    Raises CheckpointError if it holds another model.
    """
    return read_llama(checkpoint, 0, True, QWEN).config
