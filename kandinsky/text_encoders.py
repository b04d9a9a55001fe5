"""Kandinsky's two text encoders: Qwen2.5-VL's language model, and CLIP-L for one vector.

Templates and numbers of tokens are the maker's, with its spelling "promt": the weights were trained with it.
Source: the maker's code. diffusers 0.42 spells it otherwise.
"""

from dataclasses import replace

from checkpoints.tokenizers import TokenizerFiles
from encoders.clip_checkpoints import ClipNaming, clip_tokenizer_files
from encoders.language_encoder import LanguageEncoderSettings, read_qwen_tokenizer
from encoders.language_models import QWEN25_VL
from encoders.text_encoder import TokenizerSource
from kandinsky.configs import KandinskyTask

STATES_KEY, POOLED_KEY = "text_embeds", "pooled_embed"  # names in caches
QWEN_OPTION, CLIP_OPTION = "--text_encoder_qwen", "--text_encoder_clip"
TOKENIZER = TokenizerFiles(
    option="--text_encoder_qwen_tokenizer",
    names=("tokenizer.json", "vocab.json"),
    folder="tokenizer",
    repository="Qwen/Qwen2.5-VL-7B-Instruct",
    # inside the encoder's folder; next to a single file; next to text_encoder (diffusers)
    folders=(".", "qwen_2.5_vl", "tokenizer", "../tokenizer"),
    unique_token="<|im_start|>",
)
_CLIP_LINES = (
    "You are a promt engineer. Describe the video in detail.",
    "Describe how the camera moves or shakes, describe the zoom and view angle, whether it follows the "
    "objects.",
    "Describe the location of the video, main characters or objects and their action.",
    "Describe the dynamism of the video and presented actions.",
    "Name the visual style of the video: whether it is a professional footage, user generated content, some "
    "kind of animation, video game or scren content.",
    "Describe the visual effects, postprocessing and transitions if they are presented in the video.",
    "Pay attention to the order of key actions shown in the scene.",
)
_IMAGE_LINES = (
    "You are a promt engineer. Describe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:",
)


def _make_prefix(lines: tuple[str, ...]) -> str:
    system = "\n".join(lines)
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


CLIP_SETTINGS = LanguageEncoderSettings(
    name="qwen",
    states_key=STATES_KEY,
    model=replace(QWEN25_VL, option=QWEN_OPTION),
    source=TokenizerSource(TOKENIZER, adds_own=False, read_file=read_qwen_tokenizer),
    max_length=512,  # the end of the user's turn included
    template_prefix=_make_prefix(_CLIP_LINES),
    template_suffix="<|im_end|>",  # no turn of the assistant follows
    num_dropped_tokens=129,
    states=(-1,),  # behind the final norm
    batch_size=1,  # so that a state does not depend on other prompts, to the last bit
)
AUDIO_SETTINGS = replace(CLIP_SETTINGS, max_length=1024)  # of Kandinsky 6
IMAGE_SETTINGS = replace(CLIP_SETTINGS, template_prefix=_make_prefix(_IMAGE_LINES), num_dropped_tokens=41)
POOLED_CLIP = ClipNaming(
    name="clip",
    pooled_key=POOLED_KEY,
    description="CLIP-L",
    option=CLIP_OPTION,
    release="the folder text_encoder_2 of Kandinsky 5, clip-vit-large-patch14 or clip_l.safetensors",
    folder="text_encoder_2",
    tokenizer=clip_tokenizer_files(
        "--text_encoder_clip_tokenizer", (".", "clip_l", "tokenizer_2", "../tokenizer_2")
    ),
)
TEXT_KEYS = CLIP_SETTINGS.keys | POOLED_CLIP.keys


def get_language_settings(task: KandinskyTask) -> LanguageEncoderSettings:
    """Return the template of a task and what is taken from the language model's states."""
    if task.makes_images:
        return IMAGE_SETTINGS
    return AUDIO_SETTINGS if task.has_audio else CLIP_SETTINGS
