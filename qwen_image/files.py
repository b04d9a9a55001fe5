"""Qwen-Image's releases and text encoder (Qwen2.5-VL) as data, and the files of a run, each checked.

Transformer files have the released names in diffusers and ComfyUI, too. Transformers of the releases look
alike, so an option says which release a file is. Templates and lengths of texts are those of the releases;
the name of the states is that of other trainers' caches.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch

from checkpoints.dialects import DitShapes, make_wrong_kind_error
from checkpoints.dits import DitFormat, DitHeader, own_names
from checkpoints.model_files import read_once
from checkpoints.opening import Checkpoint
from checkpoints.tokenizers import TokenizerFiles
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelFiles, read_qwen_tokenizer
from encoders.language_models import QWEN25_VL
from encoders.picture_prompts import ImagePromptFormat
from encoders.text_encoder import TokenizerSource
from modules.errors import CheckpointError
from protocols.rules import ModelRelease, ReferenceRules
from qwen_image.configs import EDIT_RELEASES, PATCH, QWEN_IMAGE, QWEN_IMAGE_LAYERED, QwenImageConfig
from qwen_image.model import QwenImageModel
from qwen_image.options import EDIT, EDIT_2509, EDIT_2511, LAYERED, NAME, ORIGINAL, QwenImageModelOptions
from qwen_image.references import MEGAPIXEL, SHOWN_AREA, read_reference
from wan.spec import LATENT as WAN_LATENT
from wan.vae import WanVae, load_vae
from wan.vae_checkpoints import check_latents, read_vae

KEY = "vl_embed"
TOKENIZER = TokenizerFiles(
    option="--text_encoder_tokenizer",
    names=("tokenizer.json", "vocab.json"),
    folder="",
    repository="Qwen/Qwen2.5-VL-7B-Instruct",
    # inside the encoder's folder; next to a single file; next to text_encoder (diffusers)
    folders=(".", "qwen_2.5_vl", "tokenizer", "../tokenizer"),
    unique_token="<|im_start|>",
)
QWEN_SETTINGS = LanguageEncoderSettings(
    name="vl",
    states_key=KEY,
    model=QWEN25_VL,
    source=TokenizerSource(TOKENIZER, adds_own=False, read_file=read_qwen_tokenizer),
    max_length=1024,  # including the template's tokens after the prompt
    template_prefix="<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    template_suffix="<|im_end|>\n<|im_start|>assistant\n",
    num_dropped_tokens=34,
    batch_size=1,  # so that a state does not depend on other prompts, to the last bit
)
_SHOWN = "<|vision_start|>{tokens}<|vision_end|>"
# sizes as trained; the model sees one image
EDIT_SETTINGS = replace(
    QWEN_SETTINGS,
    template_prefix="<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or modify the "
    "image. Generate a new image that meets the user's requirements while maintaining consistency with the "
    "original input where appropriate.<|im_end|>\n<|im_start|>user\n",
    num_dropped_tokens=64,
    image_format=ImagePromptFormat(_SHOWN, read=partial(read_reference, area=MEGAPIXEL), max_images=1),
)
# it sees several, which prompts refer to by number
PLUS_SETTINGS = replace(
    EDIT_SETTINGS,
    image_format=ImagePromptFormat(
        "Picture {number}: " + _SHOWN, read=partial(read_reference, area=SHOWN_AREA)
    ),
)


MODEL_KIND = f"a {NAME} transformer"
DIT_OPTION = "--dit"
FILES = (
    "qwen_image_bf16.safetensors, qwen_image_2512_bf16.safetensors, or the folder transformer of "
    "Qwen/Qwen-Image"
)
IDENTIFYING_TENSOR = "transformer_blocks.0.img_mod.1.weight"
LAYER_TENSOR = "time_text_embed.addition_t_embedding.weight"  # tensor that identifies Qwen-Image-Layered
MAGE_FLOW = (128, 2560)  # widths of its tokens and texts, by which alone it differs
QUERY_WEIGHT = "transformer_blocks.0.attn.to_q.weight"  # its dtype counts as the file's


def _read_header(checkpoint: Checkpoint) -> DitHeader[QwenImageConfig]:
    names = checkpoint.tensors
    if IDENTIFYING_TENSOR not in names:
        raise make_wrong_kind_error(checkpoint, MODEL_KIND, DIT_OPTION, FILES)
    file_shapes = {name: info.shape for name, info in names.items()}
    shapes = DitShapes(checkpoint.path, file_shapes, NAME)
    return DitHeader(_read_config(shapes, LAYER_TENSOR in names), "released", names[QUERY_WEIGHT].dtype)


def _read_config(shapes: DitShapes, has_layers: bool) -> QwenImageConfig:
    """Return the dimensions of a transformer. Raises CheckpointError for another model's."""
    dim, token_dim = shapes.get_shape("img_in.weight")
    (head_dim,) = shapes.get_shape("transformer_blocks.0.attn.norm_q.weight", axes=1)
    # 16: a head divides into whole pairs of channels for images, rows and columns (see `rotary_widths`)
    if dim % head_dim or head_dim % 16 or token_dim % PATCH**2:
        raise CheckpointError(
            f"{shapes.path}: width {dim}, heads of {head_dim} and tokens of width {token_dim} do not "
            f"fit {MODEL_KIND}. Copy the file again.",
            shapes.path,
        )
    shapes.get_shape(QUERY_WEIGHT)  # raises if it is missing
    text_dim = shapes.get_shape("txt_in.weight")[1]
    if (token_dim, text_dim) == MAGE_FLOW:
        raise CheckpointError(
            f"{shapes.path} is the transformer of Mage-Flow, which has the names of {NAME} but another text "
            f"encoder and autoencoder, and is not supported yet.\n  Pass {FILES} to {DIT_OPTION}.",
            shapes.path,
        )
    return QwenImageConfig(
        dim=dim,
        ffn_dim=shapes.get_shape("transformer_blocks.0.img_mlp.net.0.proj.weight")[0],
        num_heads=dim // head_dim,
        num_layers=shapes.count_blocks("transformer_blocks"),
        channels=token_dim // PATCH**2,
        text_dim=text_dim,
        freq_dim=shapes.get_shape("time_text_embed.timestep_embedder.linear_1.weight")[1],
        has_layers=has_layers,
    )


FORMAT = DitFormat(
    _read_header, lambda _: MODEL_KIND, network=QwenImageModel, sources=own_names, option=DIT_OPTION
)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


# the VAE of Wan2.1 is the same
VAE_FILES = "qwen_image_vae.safetensors, the vae folder of the pipeline, or Wan2.1's VAE"
MAX_REFERENCES = 10  # images to edit; trained with up to three


@dataclass(frozen=True)
class Version:
    """A release: its names, settings of its text encoder, and its rules for reference images."""

    name: str  # name of the model in caches and saved files
    cache_tag: str
    display_name: str  # in messages
    architecture: str  # modelspec.architecture, as in musubi-tuner
    release: ModelRelease
    encoder_settings: LanguageEncoderSettings
    references: ReferenceRules | None = None
    clean_references: bool = False  # their tokens are modulated with time 0
    has_layers: bool = False  # it takes an image apart into layers
    vae_files: str = VAE_FILES


def _make_edit_version(
    option: str, encoder_settings: LanguageEncoderSettings, maximum: int, clean_references: bool = False
) -> Version:
    """Return a release that edits up to `maximum` images; `option` is its value of --model_version."""
    rules = ReferenceRules(maximum, seen_by_text=True, edits_images=True)
    display_name = f"{NAME}-{option.capitalize()}"
    architecture = f"{NAME}-Edit-Plus" if option == EDIT_2509 else display_name
    return Version(
        "qwen_image_edit",
        "qie",
        display_name=display_name,
        architecture=architecture,
        release=EDIT_RELEASES[option],
        encoder_settings=encoder_settings,
        references=rules,
        clean_references=clean_references,
    )


VERSIONS = {
    ORIGINAL: Version(
        "qwen_image",
        "qi",
        display_name=NAME,
        architecture=NAME,
        release=QWEN_IMAGE,
        encoder_settings=QWEN_SETTINGS,
    ),
    EDIT: _make_edit_version(EDIT, EDIT_SETTINGS, 1),
    EDIT_2509: _make_edit_version(EDIT_2509, PLUS_SETTINGS, MAX_REFERENCES),
    EDIT_2511: _make_edit_version(EDIT_2511, PLUS_SETTINGS, MAX_REFERENCES, clean_references=True),
    LAYERED: Version(
        "qwen_image_layered",
        "qil",
        display_name=f"{NAME}-Layered",
        architecture=f"{NAME}-Layered",
        release=QWEN_IMAGE_LAYERED,
        encoder_settings=QWEN_SETTINGS,
        has_layers=True,
        vae_files="qwen_image_layered_vae.safetensors, or the vae folder of Qwen/Qwen-Image-Layered,",
    ),
}


@dataclass(frozen=True)
class QwenImageFiles(LanguageModelFiles):
    """Model files of a run: the transformer, Wan2.1's VAE and Qwen2.5-VL's language model."""

    encoder_settings: LanguageEncoderSettings = QWEN_SETTINGS
    version: Version = VERSIONS[ORIGINAL]

    format: ClassVar[DitFormat[Any, Any]] = FORMAT
    vae_folder: ClassVar[str] = "vae"
    display_name: ClassVar[str] = NAME

    def load_vae(self, device: torch.device) -> WanVae:
        """Load the VAE in the dtype and tile size that the options set."""
        self.check_vae()
        return load_vae(self.vae_path, device, self.encoder_dtype(self.vae_dtype), tile=self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not the VAE of this model."""
        version = self.version
        model_name = f"the VAE of {version.display_name if version.has_layers else NAME}"
        config = read_once(self.vae_path, read_vae, model_name, version.vae_files).config
        latent = replace(WAN_LATENT, has_alpha=version.has_layers)
        files = version.vae_files if version.has_layers else ""
        check_latents(
            config, latent, self.vae_path, version.display_name if version.has_layers else NAME, files
        )


@dataclass(frozen=True)
class QwenImageReleaseFiles(QwenImageFiles):
    """Files of a Qwen-Image release, as opposed to another model that uses its VAE."""

    def dit_header(self) -> DitHeader[QwenImageConfig]:
        """Return the transformer's header; raise CheckpointError unless it fits --model_version."""
        header = super().dit_header()
        if header.config.has_layers and not self.version.has_layers:
            raise CheckpointError(
                f"{self.dit_path} is the transformer of {NAME}-Layered, which splits images into layers; "
                f"{self.version.display_name} needs a different one. Pass --model_version layered, or "
                "another file",
                self.dit_path,
            )
        if self.version.has_layers and not header.config.has_layers:
            raise CheckpointError(
                f"{self.dit_path} has no {LAYER_TENSOR}, so it is not the transformer of {NAME}-Layered. "
                "Pass qwen_image_layered_bf16.safetensors, or omit --model_version layered",
                self.dit_path,
            )
        return header


def make_model_files(
    options: QwenImageModelOptions, version: Version, encoder_settings: LanguageEncoderSettings
) -> QwenImageReleaseFiles:
    """Return the model files that the options of a training run or generation specify."""
    files = QwenImageReleaseFiles(encoder_settings=encoder_settings, version=version).add_dit(
        options.dit, options.dit_dtype
    )
    return files.add_vae(options.vae.file).add_text(options.text)
