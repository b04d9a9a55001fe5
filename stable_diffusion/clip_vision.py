"""CLIP vision conditioning (--clip_vision_strength): a picture's vector in place of the text's pooled state.

SDXL's second text encoder is that of OpenCLIP's bigG, whose image tower makes vectors of the same kind. The
picture's vector, times the strength, replaces the pooled state of the prompt; the negative prompt keeps its
own.
"""
# Letters: P width of the pooled state

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from encoders.clip_layers import ClipVision, load_clip_vision
from modules.checkpoints.model_files import find_model_folder
from modules.errors import CheckpointError, DownloadError, OptionError
from modules.media.reading import first_frame
from stable_diffusion.contract import SDXL, Model, ModelKind, TextState

logger = logging.getLogger(__name__)

OPTION = "--clip_vision_strength"
FOLDER = "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"  # in --tokenizer_cache_dir
REPOSITORY = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
RELEASE = f"the files config.json and model*.safetensors of {REPOSITORY}"
_NAMES = (  # of the file; the folder may hold other models, and the same one for other programs
    "model.safetensors.index.json",
    "model.safetensors",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
)
_ON_HUB = ("model.safetensors.index.json", "model-*.safetensors", "config.json")


class PictureVectors:
    """Vectors of pictures in place of pooled states. The image tower is on the device only while it works."""

    def __init__(self, model: Model, tokenizer_cache_dir: Path | None, strength: float) -> None:
        """Find the image tower's files; they are loaded with the first picture. Raises as `check_vision`."""
        self._path = check_vision(model.kind, model.path, tokenizer_cache_dir)
        self._model = model
        self._strength = strength
        self._tower: ClipVision | None = None
        self._vectors: dict[Path, Tensor] = {}

    def replace_pooled(self, states: Sequence[TextState], pictures: Sequence[Path]) -> list[TextState]:
        """Return the states of prompts with the vectors of pictures, one for each, as their pooled states.

        Each picture is seen by itself, so that its vector depends on no other, and once in a run. Raises
        CheckpointError if the tower's files are damaged or do not fit the model.
        """
        new = [path for path in dict.fromkeys(pictures) if path not in self._vectors]
        if new:
            self._see(new)
        return [
            replace(state, pooled=self._vectors[path]) for state, path in zip(states, pictures, strict=True)
        ]

    def _see(self, paths: Sequence[Path]) -> None:
        device = self._model.device
        if self._tower is None:
            self._tower = load_clip_vision(self._path, device, self._model.dtype, OPTION, RELEASE)
            logger.info("CLIP vision conditioning: %s", self._path)
            self._check_width(self._tower)
        tower = self._tower.to(device)
        for path in paths:
            image = Image.fromarray(first_frame(path)[..., :3])
            self._vectors[path] = tower.encode([image])[0] * self._strength
        if device.type != "cpu":
            tower.to("cpu")

    def _check_width(self, tower: ClipVision) -> None:
        text = self._model.texts[-1]
        projection = text.projection
        wanted = text.network.embeddings.token_embedding.embedding_dim
        wanted = wanted if projection is None else projection.shape[1]
        found = tower.visual_projection.out_features
        if found != wanted:
            raise CheckpointError(
                f"{OPTION}: the image encoder {self._path} makes vectors of {found} numbers, the pooled "
                f"state of {self._model.path} has {wanted}. Give {RELEASE}.",
                self._path,
            )


def check_vision(kind: ModelKind, checkpoint: Path, tokenizer_cache_dir: Path | None) -> Path:
    """Return the file of bigG's image tower for a checkpoint of that kind.

    Raises OptionError if it is not SDXL, DownloadError as `find_image_tower`.
    """
    if kind is not SDXL:
        raise OptionError(
            f"{OPTION}: {checkpoint} is {kind.words}, which has no pooled state to replace. Use it with "
            f"{SDXL.words}"
        )
    return find_image_tower(checkpoint, tokenizer_cache_dir)


def find_image_tower(checkpoint: Path, tokenizer_cache_dir: Path | None) -> Path:
    """Return bigG's image tower: in --tokenizer_cache_dir, beside the checkpoint, or in the hub's cache.

    checkpoint: of --ckpt. Downloads it if it is nowhere. Raises DownloadError if the hub does not give it.
    """
    beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
    places = [beside / "image_encoder"]
    if tokenizer_cache_dir is not None:
        places.insert(0, tokenizer_cache_dir / FOLDER)
    for place in places:
        file = next((place / name for name in _NAMES if (place / name).is_file()), None)
        if file is not None:
            return file
    missing = " or ".join(str(place) for place in places)
    logger.info("%s: no image encoder in %s; taking %s of the hub (10 GB)", OPTION, missing, REPOSITORY)
    try:
        return find_model_folder(OPTION, REPOSITORY, _ON_HUB) / _ON_HUB[0]
    except DownloadError as error:
        raise DownloadError(
            f"{OPTION} needs the image encoder of OpenCLIP's bigG, which is not in {missing}. Put {RELEASE} "
            f"there.\n  {error}"
        ) from error
