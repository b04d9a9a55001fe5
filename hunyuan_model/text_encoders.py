"""HunyuanVideo's two text encoders, as the shared loops use them: a language model and CLIP-L.

Names and shapes of the outputs are those of the cache format. Source of templates and lengths: the released
HunyuanVideo.
"""
# Letters: B prompts, L tokens, C = width of the model

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from encoders.clip_checkpoints import ClipUse, clip_tokenizer_files
from encoders.clip_l import ClipTextEncoder
from encoders.text_encoder import (
    FileTextEncoder,
    TextTokenizer,
    TokenizerSource,
    Written,
    check_ids,
    fill_rows,
)
from hunyuan_model.configs import SKIP_LAYERS
from hunyuan_model.llama import Llama, load_llama
from hunyuan_model.text_checkpoints import read_llama
from modules.checkpoints.model_files import inside
from modules.checkpoints.opening import open_checkpoint
from modules.checkpoints.tokenizers import TokenizerFiles
from modules.contract.data import Conditions
from modules.contract.requests import Prompt
from modules.devices import dtype_name
from modules.text_files import parse_json, read_text

logger = logging.getLogger(__name__)

CLIP = ClipUse(
    name="clipL",
    pooled="clipL",
    mask="clipL_mask",
    what="text encoder 2",
    option="--text_encoder2",
    release="the folder text_encoder_2 of HunyuanVideo, clip-vit-large-patch14 or clip_l.safetensors",
    folder="text_encoder_2",
    tokenizer=clip_tokenizer_files(
        "--text_encoder2_tokenizer", (".", "clip_l", "tokenizer_2", "../tokenizer_2")
    ),
)
LLAMA_TOKENIZER = TokenizerSource(
    TokenizerFiles(
        option="--text_encoder1_tokenizer",
        names=("tokenizer.json",),
        folder="tokenizer",
        repository="hunyuanvideo-community/HunyuanVideo",
        # inside the encoder's folder (official); beside a single file; beside text_encoder (diffusers)
        beside=(".", "llava_llama3", "tokenizer", "../tokenizer"),
        token="<|begin_of_text|>",
    ),
    begin="<|begin_of_text|>",  # some files leave it to transformers to add it
)

PROMPT_TOKENS = 256  # states of the language model that are kept
PROMPTS_AT_ONCE = 8  # bounds memory when many prompts are given


@dataclass(frozen=True)
class PromptTemplate:
    """The chat given to the language model: a system text, then the prompt as the user's words.

    crop_start: number of tokens before the prompt, whose states are cut off; None: count them.
    """

    system: str
    crop_start: int | None = None
    after: str = "<|eot_id|>"

    @property
    def before(self) -> str:
        """Return all text before the prompt."""
        system = f"<|start_header_id|>system<|end_header_id|>\n\n{self.system}<|eot_id|>"
        return system + "<|start_header_id|>user<|end_header_id|>\n\n"

    @property
    def text(self) -> str:
        """Return the template as the release writes it, with `{}` in place of the prompt."""
        return f"{self.before}{{}}{self.after}"


VIDEO_TEMPLATE = PromptTemplate(
    "Describe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:",
    crop_start=95,
)
IMAGE_TEMPLATE = PromptTemplate(
    "Describe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:",
    crop_start=36,
)


def template_of(system: str | None) -> PromptTemplate:
    """Return the template with a system text of one's own; None: the release's for videos."""
    return VIDEO_TEMPLATE if system is None else PromptTemplate(system)


class LlavaTextEncoder(FileTextEncoder[Llama]):
    """Text encoder 1: the Llama 3 of LLaVA. Each prompt gives 256 states; those after its end are masked."""

    name = "llm"
    keys = frozenset({"llm", "llm_mask"})
    what = "text encoder 1"
    source = LLAMA_TOKENIZER
    most = PROMPT_TOKENS
    weighed = "llm"
    tells_cuts = True

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float16,
        tokenizer: Path | None = None,
        template: PromptTemplate = VIDEO_TEMPLATE,
        skip_layers: int = SKIP_LAYERS,
        final_norm: bool = False,
        in_fp8: bool = False,
    ) -> None:
        """Set up the encoder; `load` reads the files.

        path: file or folder of the model, or a release's folder that holds it as `text_encoder`. dtype:
        compute dtype. skip_layers: number of layers after the state that is returned; 0 returns the last
        state, always normed. final_norm: norm other states too. in_fp8: keep the linear layers in 8 bits.
        """
        super().__init__(inside(path, "text_encoder"), tokenizer)
        self.dtype = dtype
        self.template = template
        self.skip_layers = skip_layers
        self.final_norm = final_norm or skip_layers == 0
        self.in_fp8 = in_fp8

    @property
    def identity(self) -> Mapping[str, str]:
        """Return fingerprints of checkpoint and tokenizer, config.json's values and the options used."""
        with open_checkpoint(self.path) as checkpoint:
            config = read_llama(checkpoint, self.skip_layers, self.final_norm).config
        return self.identify(
            "llm",
            config=f"{config.num_heads} heads, theta {config.theta}, eps {config.eps}",
            dtype=dtype_name(self.dtype),
            state=f"{self.skip_layers} layers skipped" + (", normed" if self.final_norm else ""),
            template=hashlib.sha256(self.template.text.encode()).hexdigest()[:16],
            weights="fp8" if self.in_fp8 else None,
        )

    def write(self, prompt: Prompt) -> Written:
        """Return the prompt in its template."""
        return Written(prompt.text, prompt.spans, self.template.before, self.template.after)

    def count_dropped(self, tokenizer: TextTokenizer) -> int:
        """Return the number of tokens before the prompt."""
        known = self.template.crop_start
        return len(tokenizer.read(self.template.before).ids) if known is None else known

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Warn if the tokenizer makes other tokens of the template than the model's own."""
        counted, known = len(tokenizer.read(self.template.before).ids), self.template.crop_start
        if known is None:
            said = "system prompt: %s (%d tokens before the prompt, which are cut off)"
            logger.info(said, self.template.system, counted)
        else:
            warn_of_other_template(counted, known, self.source.files.option)

    def load_network(self, device: torch.device) -> Llama:
        """Load the language model."""
        llama = load_llama(self.path, device, self.dtype, self.skip_layers, self.final_norm, self.in_fp8)
        logger.info("%s: %s, computing in %s", self.what, self.path, dtype_name(self.dtype))
        return llama

    def compute(
        self, network: Llama, tokenizer: TextTokenizer, rows: Sequence[list[int]], dropped: int
    ) -> list[Conditions]:
        """Return {"llm": 256 C, "llm_mask": 256 int64, 1 for real tokens} for each prompt."""
        pad, length = find_pad(tokenizer), dropped + self.most
        check_ids([[pad]], network.embed_tokens.num_embeddings, self.path, self.source.files.option)
        results: list[Conditions] = []
        for first in range(0, len(rows), PROMPTS_AT_ONCE):
            ids, mask = fill_rows(rows[first : first + PROMPTS_AT_ONCE], length, pad)
            states = network(ids.to(network.device), mask.to(network.device))[:, dropped:].cpu()
            results += [
                {"llm": state.clone(), "llm_mask": kept.clone()}
                for state, kept in zip(states, mask[:, dropped:], strict=True)
            ]
        return results


def warn_of_other_template(counted: int, known: int, option: str) -> None:
    """Warn if a tokenizer, of an option, makes another number of tokens of a template than is known."""
    if counted != known:
        logger.warning(
            "the tokenizer makes %d tokens of the template before the prompt, the model's own makes %d: "
            "prompts will be cut in the wrong place. Give the tokenizer of this model to %s.",
            counted,
            known,
            option,
        )


def find_pad(tokenizer: TextTokenizer) -> int:
    """Return the id to pad rows with. Padding is masked, so results do not depend on it."""
    try:
        told = parse_json(read_text(tokenizer.file.with_name("tokenizer_config.json"))).get("pad_token")
    except (OSError, ValueError, AttributeError):
        told = None  # the file is optional
    name = told.get("content") if isinstance(told, dict) else told
    candidates = (name, "<pad>", "<|end_of_text|>")
    ids = (tokenizer.number(token) for token in candidates if isinstance(token, str))
    return next((number for number in ids if number is not None), 0)


class HunyuanClip(ClipTextEncoder):
    """Text encoder 2: CLIP-L."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float16, tokenizer: Path | None = None) -> None:
        """Set up the encoder. Arguments as of `ClipTextEncoder`."""
        super().__init__(path, dtype, tokenizer, CLIP)
