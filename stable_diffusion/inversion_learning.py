"""Train textual inversion of a checkpoint: text encoders, files and caption templates.

Files are those that A1111's Web UI, ComfyUI and gen_img.py read: clip_l and clip_g for Stable Diffusion XL,
else emb_params. Source: Gal et al. 2022, arXiv 2208.01618, whose code (MIT) has the sentences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from encoders.clip_l import PooledClip
from encoders.inversion import Inversion, InvertedEncoder, find_in_lora
from modules.console import quiet
from modules.option_values import option_argv
from protocols.family_networks import CustomNetwork
from protocols.new_tokens import WordToLearn
from stable_diffusion.contract import SDXL
from stable_diffusion.textual_inversion import (
    SD_TENSOR_NAME,
    SDXL_TENSOR_NAMES,
    check_words,
    read_lora_words,
    read_words,
)
from stable_diffusion.training_files import TrainingFiles
from stable_diffusion.training_options import (
    InversionOptions,
    StableDiffusionTrainingOptions,
    gen_img_options,
)

MODULE = "textual inversion"  # recorded in files instead of a network module

_OBJECT_TEMPLATES = """
a photo of a {}; a rendering of a {}; a cropped photo of the {}; the photo of a {}; a photo of a clean {};
a photo of a dirty {}; a dark photo of the {}; a photo of my {}; a photo of the cool {};
a close-up photo of a {}; a bright photo of the {}; a cropped photo of a {}; a photo of the {};
a good photo of the {}; a photo of one {}; a close-up photo of the {}; a rendition of the {};
a photo of the clean {}; a rendition of a {}; a photo of a nice {}; a good photo of a {};
a photo of the nice {}; a photo of the small {}; a photo of the weird {}; a photo of the large {};
a photo of a cool {}; a photo of a small {}
"""
# as published: two of the nineteen templates occur twice
_STYLE_TEMPLATES = """
painting; rendering; cropped painting; the painting; clean painting; dirty painting; dark painting; picture;
cool painting; close-up painting; bright painting; cropped painting; good painting; close-up painting;
rendition; nice painting; small painting; weird painting; large painting
"""


def _split(sentences: str) -> tuple[str, ...]:
    return tuple(" ".join(sentence.split()) for sentence in sentences.split(";"))


OBJECT_SENTENCES = _split(_OBJECT_TEMPLATES)
STYLE_SENTENCES = tuple(
    f"{kind if kind.startswith('the ') else f'a {kind}'} in the style of {{}}"
    for kind in _split(_STYLE_TEMPLATES)
)


def describe_inversion(word: WordToLearn, files: TrainingFiles) -> CustomNetwork:
    """Describe how a training run builds and saves a word's embedding vectors for each text encoder."""
    text_encoders = [
        InvertedEncoder(tensor_name, PooledClip.embedding, partial(_tokenize, files, index))
        for index, tensor_name in enumerate(_tensor_names(files))
    ]
    return Inversion(word, text_encoders, partial(_read_start_vectors, word, files)).describe()


def _tensor_names(files: TrainingFiles) -> tuple[str, ...]:
    """Return, for each text encoder, the tensor name of its vectors in embedding files."""
    return SDXL_TENSOR_NAMES if files.kind is SDXL else (SD_TENSOR_NAME,)


def _read_start_vectors(
    word: WordToLearn, files: TrainingFiles, path: Path, option: str
) -> Mapping[str, Tensor] | None:
    """Return a word's initial vectors by tensor name; None if a LoRA does not contain the word."""
    word_in_lora = find_in_lora(path, word.text)
    if word_in_lora is not None:
        with quiet():  # the log line is about words for prompts
            (learned_word,) = read_lora_words({path: {word.text: word_in_lora}}, option)
    elif word.weights is None:  # `path` is a LoRA to continue training
        return None
    else:
        (learned_word,) = read_words([path], option=option)
    with files.open_plan() as checkpoint_plan:
        widths = [text.load_plan.config.dim for text in checkpoint_plan.text_encoders]
    check_words([learned_word], widths, files.kind)
    return dict(zip(_tensor_names(files), learned_word.vectors, strict=True))


def _tokenize(files: TrainingFiles, index: int, text: str) -> list[int]:
    """Return a text's token ids in text encoder `index`; [] if part of it is not in the vocabulary."""
    tokenizer = files.tokenizers[index]
    ids = tokenizer.tokenize(text)
    # the end token also stands for text that is not in the vocabulary
    return [] if tokenizer.end in ids else ids


def describe_extended_inversion(
    word: WordToLearn, files: TrainingFiles, layers: Sequence[str]
) -> CustomNetwork:
    """Describe how a training run builds a word's vectors for each cross-attention of the U-Net.

    Args:
        word: The word to learn.
        files: The checkpoint; its only text encoder gets the vectors.
        layers: Names of the cross-attentions in embedding files.
    """

    def read_start_vectors(path: Path, option: str) -> Mapping[str, Tensor]:
        with quiet():  # the log line is about words for prompts
            (learned_word,) = read_words((), [path], layers)
        # the vectors of all cross-attentions are stored layer by layer
        return dict(zip(layers, learned_word.vectors[0].chunk(len(layers)), strict=True))

    # one text encoder, with separate vectors for each cross-attention
    text_encoder = InvertedEncoder(
        SD_TENSOR_NAME, PooledClip.embedding, partial(_tokenize, files, 0), layer_keys=tuple(layers)
    )
    return Inversion(word, [text_encoder], read_start_vectors).describe()


def with_templates_and_command(
    network: CustomNetwork, options: InversionOptions, option: str = "--textual_inversion_embeddings"
) -> CustomNetwork:
    """Return a word's trainable network with its caption templates and the command that generates with it.

    Args:
        network: The trainable network.
        options: Options of the run.
        option: Option of gen_img.py that reads the trained file.
    """
    word = options.word.text
    return replace(
        network,
        sentences=tuple(sentence.format(word) for sentence in _choose_sentences(options)),
        generate=partial(_list_generation_command, options, option),
    )


def _choose_sentences(options: InversionOptions) -> tuple[str, ...]:
    """Return caption templates for a new word; () if training uses the dataset's own captions."""
    if options.use_object_template:
        return OBJECT_SENTENCES
    return STYLE_SENTENCES if options.use_style_template else ()


def _list_generation_command(
    options: InversionOptions, option: str, file: Path, sample: Mapping[str, Any], _: Sequence[str]
) -> list[str]:
    """Return the arguments of gen_img.py, including its name, to generate an image with a trained word."""
    arguments = {
        **gen_img_options(cast(StableDiffusionTrainingOptions, options), sample),
        option: file,
        "--prompt": sample.get("prompt"),
        "--outdir": file.parent / "generated",
    }
    return ["gen_img.py", *option_argv(arguments)]
