"""HunyuanImage-2.1's text encoders, as the shared loops use them: a language model, and one for glyphs.

Names and shapes of the outputs are those of other trainers' caches. For a text alone, Qwen2.5-VL's rotary
positions equal plain ones. Source: Bai et al. 2025, arXiv 2502.13923; template and lengths are those of the
released HunyuanImage-2.1.
"""
# Letters: L tokens, C = width of the model

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.model_files import inside
from checkpoints.opening import fingerprint
from checkpoints.tokenizers import TokenizerFiles
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelEncoder
from encoders.language_models import QWEN25_VL
from encoders.t5 import byte_rows, load_byt5
from encoders.t5_network import T5Network
from encoders.text_encoder import TokenizerSource
from hunyuan_image.configs import GLYPH_TOKENS, TEXT_TOKENS
from modules.devices import dtype_name
from protocols.data import Conditions
from protocols.family import EncoderAbilities
from protocols.requests import Prompt
from protocols.rules import CountTokens, TokenCount
from runtime.offload.host_memory import LoadedNetwork

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
NUM_TEMPLATE_TOKENS = 34  # tokens of the template before the prompt, whose states are cut off
BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
AFTER = "<|im_end|>"

TOKENIZER = TokenizerSource(
    TokenizerFiles(
        option="--text_encoder_tokenizer",
        names=("tokenizer.json",),
        folder="",
        repository="Qwen/Qwen2.5-VL-7B-Instruct",
        # inside the encoder's folder; next to a single file; next to text_encoder (diffusers)
        folders=(".", "qwen_2.5_vl", "tokenizer", "../tokenizer"),
        unique_token="<|im_start|>",
    ),
    adds_own=False,
)


QWEN_USE = LanguageEncoderSettings(
    name="vlm",
    states_key="vlm_embed",
    mask_key="vlm_mask",
    model=QWEN25_VL,
    source=TOKENIZER,
    max_length=TEXT_TOKENS,
    template_prefix=BEFORE,
    template_suffix=AFTER,
    num_dropped_tokens=NUM_TEMPLATE_TOKENS,
    states=(-3,),  # two layers follow it; it is not normed
    batch_size=1,
)

# in this order; an apostrophe is not a mark, and a text ends on its line
_QUOTED = tuple(re.compile(f"{first}(.*?){last}") for first, last in ('""', "\u2018\u2019", "\u201c\u201d"))


def find_quoted_texts(prompt: str) -> list[str]:
    """Return the quoted texts: those in straight quotes first, then single curly, then double curly ones."""
    return [text for pattern in _QUOTED for text in pattern.findall(prompt)]


def make_glyph_prompt(prompt: str) -> str | None:
    """Return the text for the glyph encoder; None if the prompt quotes nothing."""
    quoted = find_quoted_texts(prompt)
    return "".join(f'Text "{text}". ' for text in quoted) if quoted else None


class QwenTextEncoder(LanguageModelEncoder):
    """Qwen2.5-VL's language model, which gives one state for each token of a prompt.

    Prompts are encoded one at a time: several at once would be summed in another order, which changes the
    last bits.
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.bfloat16,
        tokenizer: Path | None = None,
        form: str | None = None,
        on_cpu: bool = False,
    ) -> None:
        super().__init__(QWEN_USE, path, dtype, tokenizer, form=form, on_cpu=on_cpu)

    @property
    def state(self) -> None:
        """Return None: caches do not record the kind of states, because it has never changed."""


class GlyphTextEncoder:
    """ByT5 for rendered characters: encode the quoted words of a prompt.

    Weights of parts of a prompt have no effect.
    """

    name = "byt5"
    keys = frozenset({"byt5_embed", "byt5_mask", "ocr_mask"})
    abilities = EncoderAbilities()
    variable_length: frozenset[str] = frozenset()
    max_tokens = GLYPH_TOKENS

    def __init__(self, path: Path, dtype: torch.dtype = torch.float16, on_cpu: bool = False) -> None:
        """Set up the encoder; `load` reads the file.

        Args:
            path: File or folder of the model, or a release's folder that holds it as `text_encoder_2`.
            dtype: Compute dtype.
            on_cpu: Run on the CPU whatever device is used otherwise.
        """
        self.path = inside(path, "text_encoder_2")
        self.dtype = dtype
        self.on_cpu = on_cpu
        self._loaded = LoadedNetwork[T5Network, None]()

    @property
    def identity(self) -> Mapping[str, str]:
        """Return what the text states depend on besides the text; reads no weights."""
        return {"byt5": fingerprint(self.path), "byt5_dtype": dtype_name(self.dtype)}

    def token_counter(self) -> CountTokens:
        """Return a function that counts ByT5's tokens: one per byte to render, plus the end token."""

        def count(text: str) -> TokenCount:
            glyphs = self.make_text(text) or ""
            tokens = len(glyphs.encode()) + 1 if glyphs else 0
            encoded = glyphs.encode()[: self.max_tokens - 1]
            num_characters = len(encoded.decode(errors="ignore"))  # that fit
            return TokenCount(glyphs, tokens, self.max_tokens, num_characters)

        return count

    def load(self, device: torch.device) -> None:
        """Load the network onto `device`, or onto the CPU with `on_cpu`."""
        self._loaded.load(CPU if self.on_cpu else device, self._read)

    def _read(self, device: torch.device) -> tuple[T5Network, None]:
        return load_byt5(self.path, device, self.dtype), None

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Encode prompts' quoted texts as {"byt5_embed": 128 C, "byt5_mask": 128 int64, "ocr_mask": bool}.

        All are on the CPU. `ocr_mask` is a scalar: whether the prompt quotes a text to draw. If not, states
        and mask are zeros; rows of padding are zeros, too.
        """
        results: list[Conditions] = []
        for rows in self.encode_glyphs(prompts):
            states = torch.zeros(self.max_tokens, rows.shape[1], dtype=self.dtype)
            states[: len(rows)] = rows
            mask = (torch.arange(self.max_tokens) < len(rows)).to(torch.int64)
            results.append(
                {"byt5_embed": states, "byt5_mask": mask, "ocr_mask": torch.tensor(bool(len(rows)))}
            )
        return results

    def encode_glyphs(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Return ByT5's states for each prompt's quoted texts, G C on the CPU; G is 0 if there are none."""
        network, _ = self._loaded.get()
        states: list[Tensor] = []
        for prompt in prompts:
            text = self.make_text(prompt.text)
            if text is None:
                states.append(torch.zeros(0, network.config.dim, dtype=self.dtype))
                continue
            (ids,), (mask,) = byte_rows([text], self.max_tokens)
            # alone and without padding: a state does not depend on other prompts
            (rows,) = network([ids[: int(mask.sum())]])
            states.append(rows.to("cpu", self.dtype))
        return states

    def make_text(self, prompt: str) -> str | None:
        """Return the text that ByT5 encodes for a prompt; None if the prompt quotes nothing."""
        return make_glyph_prompt(prompt)

    def free(self) -> None:
        """Unload the network."""
        self._loaded.free()
