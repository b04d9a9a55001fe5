"""CLIP and SigLIP models from transformers: embeddings of images and texts, whose cosine is their similarity.

DINO models embed images only, to compare them with each other.

Code and pickles that come with a model are never run.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from checkpoints.model_folders import build_on_meta, check_settings, require_matching_shapes
from modules.control_codes import shorten
from modules.devices import select_device
from modules.errors import CheckpointError
from modules.media.reading import Frame
from modules.text_files import parse_json, read_text

CONFIG = "config.json"
LIKENESS_OPTION = "--likeness_model"
OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
HASHED_BYTES = 1 << 20  # bytes at both ends of a file of weights that are hashed to identify it


@dataclass(frozen=True)
class ImageTextKind:
    """The `transformers` class and the text padding of one kind of image-text model."""

    network: str  # name of the class in transformers
    padding: str  # padding that the model was trained with


# by `model_type` of config.json
KINDS: Mapping[str, ImageTextKind] = {
    "clip": ImageTextKind("CLIPModel", "longest"),
    "siglip": ImageTextKind("SiglipModel", "max_length"),
}


# models of images alone: their classes in transformers, by `model_type` in config.json
IMAGE_KINDS: Mapping[str, str] = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}


class EmbedsImages(Protocol):
    """Interface of a model that computes image embeddings."""

    @property
    def identity(self) -> str:
        """Key under which embeddings are stored: equal for folders that contain the same model."""

    def embed_images(self, frames: Sequence[Frame]) -> Tensor:
        """Return a vector of length 1 for each frame, N D float32 on the CPU."""


@dataclass(frozen=True)
class ImageModel:
    """A loaded vision model without a text encoder, with its preprocessing."""

    network: Any
    processor: Any
    identity: str  # equal for folders with the same model

    @torch.no_grad()
    def embed_images(self, frames: Sequence[Frame]) -> Tensor:
        """Return the class token's embedding of each frame, normalized to length 1: N D float32 on the CPU.

        Args:
            frames: Frames, each H W 3.
        """
        images = [Image.fromarray(frame) for frame in frames]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return _with_length_one(self.network(pixel_values=pixels.to(self.network.device)).pooler_output)


@dataclass(frozen=True)
class ImageTextModel:
    """A loaded image-text model, such as CLIP, with its preprocessing."""

    network: Any
    processor: Any  # preprocesses images
    tokenizer: Any
    padding: str
    max_tokens: int
    identity: str  # equal for folders with the same model

    @torch.no_grad()
    def embed_images(self, frames: Sequence[Frame]) -> Tensor:
        """Return a vector of length 1 for each frame, N D float32 on the CPU.

        Args:
            frames: Frames, each H W 3.
        """
        images = [Image.fromarray(frame) for frame in frames]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        output = self.network.get_image_features(pixel_values=pixels.to(self.network.device))
        return _with_length_one(output.pooler_output)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return a vector of length 1 for each text, N D float32 on the CPU. Long texts are truncated."""
        tokens = self.tokenizer(
            list(texts),
            padding=self.padding,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        # SigLIP was trained without a mask: its texts attend to the padding
        names = ("input_ids",) if self.padding == "max_length" else ("input_ids", "attention_mask")
        output = self.network.get_text_features(
            **{name: tokens[name].to(self.network.device) for name in names}
        )
        return _with_length_one(output.pooler_output)

    def is_truncated(self, text: str) -> bool:
        """Return whether a text has more tokens than the model accepts, so that its end is ignored."""
        return len(self.tokenizer(text)["input_ids"]) > self.max_tokens


def _with_length_one(vectors: Tensor) -> Tensor:
    # with the same operations as CLIPModel, so that results are equal to the last bit
    squares = torch.sum(torch.pow(vectors, 2), dim=-1, keepdim=True)
    return (vectors / torch.pow(squares, 0.5)).float().cpu()


def load_image_text_model(folder: Path, device: str | None) -> ImageTextModel:
    """Load the model in a folder to a device, in float32.

    Args:
        folder: Folder of the files.
        device: Device; None for the best one available.

    Raises:
        CheckpointError: If the folder does not contain an image-text model, or if its files are damaged.
    """
    selected_device = select_device(device)
    kind, max_tokens = _read_kind(folder)
    loaded = _load_network(folder, "--model", kind.network)
    return ImageTextModel(
        network=loaded.network.to(selected_device),
        processor=loaded.processor,
        tokenizer=_load_tokenizer(folder, kind.network),
        padding=kind.padding,
        max_tokens=max_tokens,
        identity=_identify(folder),
    )


def load_image_model(folder: Path, device: str | None) -> ImageModel:
    """Load the DINO model in a folder to a device, in float32.

    Args:
        folder: Folder of the files.
        device: Device; None for the best one available.

    Raises:
        CheckpointError: If the folder does not contain a DINO model, or if its files are damaged.
    """
    selected_device = select_device(device)
    name = _read_config(folder, LIKENESS_OPTION, tuple(IMAGE_KINDS)).get("model_type")
    loaded = _load_network(folder, LIKENESS_OPTION, IMAGE_KINDS[str(name)])
    return ImageModel(loaded.network.to(selected_device), loaded.processor, _identify(folder))


@dataclass(frozen=True)
class ImageNetwork:
    """A model of the `transformers` package, with its image preprocessing."""

    network: Any
    processor: Any


def _load_network(folder: Path, option: str, class_name: str) -> ImageNetwork:
    """Load a network and its preprocessing. Raises CheckpointError if transformers cannot load them."""
    shapes = check_settings(folder, option)
    import transformers  # slow, so only after the folder has been checked

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        network_class = getattr(transformers, class_name)
        config = network_class.config_class.from_pretrained(folder, **OFFLINE)
        # a network on the meta device provides the shapes that tensors in the files must have
        network = build_on_meta(network_class, config)
        require_matching_shapes(folder, option, network, shapes, is_exact=True)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **OFFLINE)
        # set the attention, because config.json could name one whose code is downloaded from the hub and run
        network = network_class.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            attn_implementation="sdpa",
            local_files_only=True,
        )
    except CheckpointError:
        raise
    except Exception as error:  # damaged files raise errors from many libraries
        raise _explain_loading(folder, option, class_name, error) from None
    return ImageNetwork(network.eval().requires_grad_(False), processor)


def _load_tokenizer(folder: Path, class_name: str) -> Any:
    import transformers  # the network is loaded by now

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **OFFLINE)
    except Exception as error:  # damaged files raise errors from many libraries
        raise _explain_loading(folder, "--model", class_name, error) from None


def _explain_loading(folder: Path, option: str, class_name: str, error: Exception) -> CheckpointError:
    why = shorten(" ".join(str(error).split()), 300)
    return CheckpointError(f"{option} {folder}: transformers cannot load it as {class_name}: {why}")


def _read_kind(folder: Path) -> tuple[ImageTextKind, int]:
    """Return the kind of the model in a folder, and its maximum number of text tokens."""
    config = _read_config(folder, "--model", tuple(KINDS))
    name = str(config.get("model_type"))
    text = config.get("text_config")
    default = 64 if name == "siglip" else 77  # defaults of transformers
    max_tokens = text.get("max_position_embeddings", default) if isinstance(text, dict) else default
    if type(max_tokens) is not int or not 2 < max_tokens < 1 << 20:
        raise CheckpointError(f"{folder / CONFIG}: max_position_embeddings of text_config is {max_tokens!r}")
    return KINDS[name], max_tokens


def _read_config(folder: Path, option: str, kinds: Sequence[str]) -> Any:
    """Return config.json of a model folder. Raises CheckpointError if its model_type is not in `kinds`."""
    config: Any = {}
    if (folder / CONFIG).is_file():
        try:
            config = parse_json(read_text(folder / CONFIG))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from None
    elif option == LIKENESS_OPTION:
        raise CheckpointError(
            f"{option} {folder}: there is no {CONFIG} in this folder. Pass the folder of a DINO model as "
            "transformers saves it, or omit it."
        )
    else:
        raise CheckpointError(
            f"{option} {folder}: there is no {CONFIG} in this folder. Download a model with "
            "python tools/download.py --family tools --task score_clip --to models, or pass the folder of a "
            "CLIP or SigLIP model as transformers saves it."
        )
    name = str(config.get("model_type")) if isinstance(config, dict) else ""
    if name not in kinds:
        raise CheckpointError(
            f"{option} {folder}: its {CONFIG} says model_type {name!r}. Pass a model of one of the types "
            f"{', '.join(kinds)}."
        )
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{option} {folder}: its weights are quantized, for which transformers may fetch code. Pass the "
            "model in 16 or 32 bits."
        )
    return config


def _identify(folder: Path) -> str:
    """Return a hash of the sizes, beginnings and ends of a model's files, which identifies the model."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in {".json", ".safetensors", ".model"} or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            digest.update(file.read(HASHED_BYTES))
            file.seek(max(0, size - HASHED_BYTES))
            digest.update(file.read(HASHED_BYTES))
    return digest.hexdigest()[:16]
