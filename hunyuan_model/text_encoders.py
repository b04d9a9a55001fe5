"""HunyuanVideo's two text encoders, as the shared loops use them: a language model and CLIP-L.

Names and shapes of the outputs are those of the cache format. Source of templates and lengths: the released
HunyuanVideo.
"""
# Letters: B prompts, L tokens, C = width of the model

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from checkpoints.tokenizers import TokenizerFiles
from encoders.clip_checkpoints import ClipNaming, clip_tokenizer_files
from encoders.clip_l import ClipTextEncoder
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelEncoder
from encoders.language_models import LLAMA
from encoders.text_encoder import TextTokenizer, TokenizerSource
from hunyuan_model.options import SKIP_LAYERS
from modules.text_files import parse_json, read_text

logger = logging.getLogger(__name__)

CLIP = ClipNaming(
    name="clipL",
    pooled_key="clipL",
    mask_key="clipL_mask",
    description="text encoder 2",
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
        # inside the encoder's folder (official); next to a single file; next to text_encoder (diffusers)
        folders=(".", "llava_llama3", "tokenizer", "../tokenizer"),
        unique_token="<|begin_of_text|>",
    ),
    begin="<|begin_of_text|>",  # not in every tokenizer file: transformers may add it
)

PROMPT_TOKENS = 256  # states of the language model that are kept


@dataclass(frozen=True)
class PromptTemplate:
    """Chat template for the language model: a system message, then the prompt as the user's message.

    Attributes:
        system: The system message.
        crop_start: Number of tokens before the prompt, whose states are cut off; None to count them.
        after: Text after the prompt.
    """

    system: str
    crop_start: int | None = None
    after: str = "<|eot_id|>"

    @property
    def before(self) -> str:
        """Text before the prompt."""
        system = f"<|start_header_id|>system<|end_header_id|>\n\n{self.system}<|eot_id|>"
        return system + "<|start_header_id|>user<|end_header_id|>\n\n"

    @property
    def text(self) -> str:
        """The whole template, with {} for the prompt."""
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


def select_template(system: str | None) -> PromptTemplate:
    """Return the template with a custom system message; None for the default template for videos."""
    return VIDEO_TEMPLATE if system is None else PromptTemplate(system)


LLAVA_SETTINGS = LanguageEncoderSettings(
    name="llm",
    states_key="llm",
    mask_key="llm_mask",
    model=LLAMA,
    source=LLAMA_TOKENIZER,
    max_length=PROMPT_TOKENS,
    pad_token="",
    record_prefix="llm",
)


class LlavaTextEncoder(LanguageModelEncoder):
    """Text encoder 1: the Llama 3 of LLaVA. Each prompt gives 256 states; those after its end are masked."""

    description = "text encoder 1"
    default_settings: ClassVar[LanguageEncoderSettings] = LLAVA_SETTINGS

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float16,
        tokenizer: Path | None = None,
        template: PromptTemplate = VIDEO_TEMPLATE,
        skip_layers: int = SKIP_LAYERS,
        final_norm: bool = False,
        form: str | None = None,
    ) -> None:
        """Set up the encoder; `load` reads the files.

        Args:
            path: File or folder of the model, or of a release that has it in its subfolder `text_encoder`.
            dtype: Compute dtype.
            tokenizer: Folder or file of the tokenizer.
            template: Chat template for each prompt.
            skip_layers: Number of layers after the returned state; 0 returns the last state, which is always
                normalized.
            final_norm: Apply the final norm to other states, too.
            form: Module of `checkpoints.stored` that quantizes the weights; None keeps the file's form.
        """
        use = replace(
            self.default_settings,
            template_prefix=template.before,
            template_suffix=template.after,
            num_dropped_tokens=template.crop_start,
            states=(-1 - skip_layers,),  # counted from the end
            final_norm=final_norm or skip_layers == 0,
        )
        super().__init__(use, path, dtype, tokenizer, form=form)
        self.template = template

    @property
    def state(self) -> str:
        """Description of the returned hidden state, such as "2 layers skipped", for cache records."""
        return f"{-1 - self.settings.states[0]} layers skipped" + (
            ", normed" if self.settings.final_norm else ""
        )

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Warn if the tokenizer splits the template into different tokens than the model's own tokenizer."""
        super().check_tokenizer(tokenizer)
        if self.settings.num_dropped_tokens is None:
            message = "system prompt: %s (%d tokens before the prompt, which are cut off)"
            logger.info(message, self.template.system, self.count_template_tokens(tokenizer))

    def find_pad(self, tokenizer: TextTokenizer) -> int:
        """Return an id to pad rows with; any id will do, because padding is masked."""
        return find_pad(tokenizer)


def find_pad(tokenizer: TextTokenizer) -> int:
    """Return the id to pad rows with. Padding is masked, so any id gives the same result."""
    try:
        settings = parse_json(read_text(tokenizer.file.with_name("tokenizer_config.json")))
        pad_token = settings.get("pad_token")
    except (OSError, ValueError, AttributeError):
        pad_token = None  # the file is optional
    name = pad_token.get("content") if isinstance(pad_token, dict) else pad_token
    candidates = (name, "<pad>", "<|end_of_text|>")
    ids = (tokenizer.token_to_id(token) for token in candidates if isinstance(token, str))
    return next((pad_id for pad_id in ids if pad_id is not None), 0)


class HunyuanClip(ClipTextEncoder):
    """Text encoder 2: CLIP-L."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float16, tokenizer: Path | None = None) -> None:
        super().__init__(path, dtype, tokenizer, CLIP)
