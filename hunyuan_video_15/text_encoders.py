"""HunyuanVideo 1.5's two text encoders: Qwen2.5-VL's language model, and ByT5 for texts in quotation marks.

Template and numbers of tokens are those of the release, as diffusers has them: the points of the system
message are on one line, with eight blanks before each, and the number of tokens that are cut off in front
counts them. Names of the outputs are those of musubi-tuner's caches.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from encoders.language_encoder import LanguageEncoderSettings, read_qwen_tokenizer
from encoders.language_models import QWEN25_VL
from encoders.text_encoder import TokenizerSource
from hunyuan_image.text_encoders import TOKENIZER, GlyphTextEncoder
from hunyuan_video_15.configs import GLYPH_TOKENS, TEXT_TOKENS
from protocols.data import Conditions
from protocols.requests import Prompt

STATES_KEY, GLYPHS_KEY = "vl_embed", "byt5_embed"  # names in caches
TOKENIZER_FILES = replace(TOKENIZER.files, names=("tokenizer.json", "vocab.json"))
POINTS = (
    "1. The main content and theme of the video.",
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
    "4. background environment, light, style and atmosphere.",
    "5. camera angles, movements, and transitions used in the video.",
)
SYSTEM = (" " * 9).join(
    ("You are a helpful assistant. Describe the video by detailing the following aspects:", *POINTS)
)
QWEN_SETTINGS = LanguageEncoderSettings(
    name="vl",
    states_key=STATES_KEY,
    model=QWEN25_VL,
    source=TokenizerSource(TOKENIZER_FILES, adds_own=False, read_file=read_qwen_tokenizer),
    max_length=TEXT_TOKENS,
    template_prefix=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n",
    # the assistant's turn stays in the states
    template_suffix="<|im_end|>\n<|im_start|>assistant\n",
    num_dropped_tokens=108,
    empty_prompt_text=" ",
    states=(-3,),  # two layers follow it; it is not normed
    batch_size=1,  # so that a state does not depend on other prompts, to the last bit
)
# in the order in which they stand in the prompt; a text ends on its line
_QUOTED = re.compile(r"\"(.*?)\"|\u201c(.*?)\u201d")


def make_glyph_text(prompt: str) -> str | None:
    """Return the text for ByT5: each quoted text of a prompt once; None if the prompt quotes nothing."""
    quoted = dict.fromkeys(straight or curly for straight, curly in _QUOTED.findall(prompt))
    return "".join(f'Text "{text}". ' for text in quoted) if quoted else None


class QuotedTextEncoder(GlyphTextEncoder):
    """ByT5 for the quoted words of a prompt, whose states have no padding."""

    keys = frozenset({GLYPHS_KEY})
    variable_length = keys
    max_tokens = GLYPH_TOKENS

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Encode prompts' quoted texts as {"byt5_embed": G C} on the CPU; G is 0 if there are none."""
        return [{GLYPHS_KEY: states} for states in self.encode_glyphs(prompts)]

    def make_text(self, prompt: str) -> str | None:
        """Return the text that ByT5 encodes for a prompt; None if the prompt quotes nothing."""
        return make_glyph_text(prompt)


TEXT_KEYS = QWEN_SETTINGS.keys | QuotedTextEncoder.keys
