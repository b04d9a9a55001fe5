"""Qwen-Image's text encoder: what is taken from Qwen2.5-VL, as data for `encoders.language_encoder`.

Templates and lengths are those of the releases; the name of the states is that of the known caches.
"""

from dataclasses import replace
from functools import partial

from encoders.language_encoder import LanguageUse, read_qwen_tokenizer
from encoders.language_models import QWEN25_VL
from encoders.picture_prompts import PictureUse
from encoders.text_encoder import TokenizerSource
from modules.checkpoints.tokenizers import TokenizerFiles
from qwen_image.references import MEGAPIXEL, SHOWN_AREA, read_reference

KEY = "vl_embed"
TOKENIZER = TokenizerFiles(
    option="--text_encoder_tokenizer",
    names=("tokenizer.json", "vocab.json"),
    folder="",
    repository="Qwen/Qwen2.5-VL-7B-Instruct",
    # inside the encoder's folder; beside a single file; beside text_encoder (diffusers)
    beside=(".", "qwen_2.5_vl", "tokenizer", "../tokenizer"),
    token="<|im_start|>",
)
QWEN_USE = LanguageUse(
    name="vl",
    states_key=KEY,
    model=QWEN25_VL,
    source=TokenizerSource(TOKENIZER, adds_own=False, read_file=read_qwen_tokenizer),
    most=1024,  # with those of the template behind the prompt
    before="<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    after="<|im_end|>\n<|im_start|>assistant\n",
    dropped=34,
    at_once=1,  # so that a state does not depend on other prompts, to the last bit
)
_SHOWN = "<|vision_start|>{tokens}<|vision_end|>"
# sizes as trained; the model sees one picture
EDIT_USE = replace(
    QWEN_USE,
    before="<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, "
    "objects, background), then explain how the user's text instruction should alter or modify the image. "
    "Generate a new image that meets the user's requirements while maintaining consistency with the original "
    "input where appropriate.<|im_end|>\n<|im_start|>user\n",
    dropped=64,
    pictures=PictureUse(_SHOWN, read=partial(read_reference, area=MEGAPIXEL), shown=1),
)
# it sees several, which prompts call by their numbers
PLUS_USE = replace(
    EDIT_USE,
    pictures=PictureUse("Picture {number}: " + _SHOWN, read=partial(read_reference, area=SHOWN_AREA)),
)
