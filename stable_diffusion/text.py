"""Encode prompts: weights, chunks, concatenated states, and the pooled state or an image vector instead.

Each text is encoded alone, with all of its chunks in one pass of each encoder, so that its state depends on
no other text. States are cached, because most images have the same negative prompt.
"""

# Letters: K chunks of a text, L = 75 K + 2 states of it, C width

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from checkpoints.model_files import find_model_folder
from encoders.clip_checkpoints import ClipTextConfig
from encoders.clip_layers import ClipVision, load_clip_vision
from generation.embedding_marks import warn_of_unknown
from modules.control_codes import shorten
from modules.errors import CheckpointError, DownloadError, OptionError
from modules.media.reading import first_frame
from stable_diffusion import tokenizers
from stable_diffusion.contract import SD1, SD2, SDXL, LoadedTextEncoder, Model, ModelKind, TextState
from stable_diffusion.options import TextOptions
from stable_diffusion.textual_inversion import (
    LearnedWord,
    add_words,
    check_words,
    list_ids,
    merge_lora_words,
    read_words,
)

logger = logging.getLogger(__name__)

_LOADER = "gen_img.py loads one by --textual_inversion_embeddings FILE"
REMEMBERED = 64  # cached texts; an SDXL text of one chunk takes 0.6 MB in float32
SHOWN = 200  # characters of a text in a warning


class Texts:
    """Encode prompts with the text encoders of a model and the options for texts."""

    def __init__(
        self,
        text_encoders: Sequence[LoadedTextEncoder],
        kind: ModelKind,
        options: TextOptions,
        layers: Sequence[str] = (),
        lora_words: Sequence[LearnedWord] = (),
    ) -> None:
        """Add the words of embeddings to the encoders, whose networks get new rows.

        Args:
            text_encoders: Text encoders of the checkpoint.
            kind: Kind of the checkpoint.
            options: Options of texts.
            layers: Names of the U-Net's cross-attentions, with --XTI_embeddings. A text then has states for
                each of these, one after the other.
            lora_words: Words in the files of LoRAs.

        Raises:
            OptionError: If an encoder lacks the layer of --clip_skip.
            CheckpointError: If vectors do not fit an encoder, or if a word exists already as a token.
        """
        words = merge_lora_words(_read_words(options, layers), lora_words)
        self._text_encoders = add_words(text_encoders, kind, words)
        # all words that embeddings and LoRAs have brought; their ids are not used here
        self._known = [*list_ids(words, 0)]
        self._num_layer_copies = max(len(layers), 1)  # number of copies of a text's states
        self._kind = kind
        self._mode = options.emb_normalize_mode
        self._most = options.max_embeddings_multiples or 1
        self._layers = [
            _select_layer(text_encoder, kind, options.clip_skip) for text_encoder in self._text_encoders
        ]
        # token ids take far less memory than states, so those of more texts are kept
        self._chunks_of = lru_cache(4 * REMEMBERED)(self._cut_all)
        self._remembered = lru_cache(REMEMBERED)(self._encode)

    def chunks(self, text: str) -> int:
        """Return the number of 75-token chunks of a text, at least 1 and at most the limit."""
        return max(len(chunks) for chunks in self._chunks_of(text))

    def encode(self, text: str, chunks: int | None = None, networks: Hashable = None) -> TextState:
        """Return the text encoder states of a prompt, which are cached: do not change them in place.

        Weights multiply each encoder's states separately. The pooled state (SDXL) is that of the last encoder
        for the first chunk, without weights.

        Args:
            text: The prompt.
            chunks: Number of chunks to which the text is padded; None for no padding.
            networks: Other values on which the result depends, such as multipliers of LoRAs in the text
                encoders.
        """
        chunks = self.chunks(text) if chunks is None else chunks
        return self._remembered(text, chunks, networks)

    @torch.no_grad()
    def _encode(self, text: str, count: int, networks: Hashable) -> TextState:
        """Encode a prompt in `count` chunks with all text encoders, and concatenate their states."""
        del networks  # only part of the cache's key
        contexts: list[Tensor] = []
        pooled = None
        for text_encoder, layer, chunks in zip(
            self._text_encoders, self._layers, self._chunks_of(text), strict=True
        ):
            if len(chunks) > count:
                raise ValueError(f"{len(chunks)} chunks do not fit into {count}")
            filled = [*chunks, *[tokenizers.Chunk()] * (count - len(chunks))]
            context, pooled = self._encode_chunks(text_encoder, layer, filled)
            contexts.append(context)
        return TextState(torch.cat(contexts, dim=-1), None if pooled is None else pooled[0])

    def _encode_chunks(
        self, text_encoder: LoadedTextEncoder, layer: int, chunks: Sequence[tokenizers.Chunk]
    ) -> tuple[Tensor, Tensor | None]:
        """Return a prompt's states in one encoder, concatenated over chunks, and pooled states if used."""
        is_pooled = self._kind is SDXL  # only SDXL uses pooled states, of its last encoder
        rows = [
            tokenizers.fill_chunk(
                chunk.ids,
                start=text_encoder.bos_token_id,
                end=text_encoder.eos_token_id,
                pad=text_encoder.pad_token_id,
            )
            for chunk in chunks
        ]
        weights = weights_of(chunks)
        ids = self._copy_ids(text_encoder, torch.tensor(rows))  # once, or once for each cross-attention
        device = text_encoder.network.device
        ends: Tensor | None = None
        if is_pooled and text_encoder is self._text_encoders[-1]:
            # index of each chunk's end token; an earlier one if the text itself contains <|endoftext|>
            ends = torch.tensor([row.index(text_encoder.eos_token_id) for row in rows]).to(device)
        states, pooled = text_encoder.network.states(
            torch.cat(ids).to(device),
            layer,
            final_norm=not is_pooled,
            ends=ends,
        )
        copies = []
        for chunk_states in states.chunk(len(ids)):
            text_states = join_chunks(chunk_states)
            copies.append(weigh_states(text_states, weights, self._mode))
        # all cross-attentions share the states unless a word has vectors for each of them
        repeats = self._num_layer_copies // len(ids)
        return torch.cat(copies * repeats), pooled

    def _copy_ids(self, text_encoder: LoadedTextEncoder, ids: Tensor) -> list[Tensor]:
        """Return a text's token ids, K 77: once, or per cross-attention if a word has vectors for each."""
        if text_encoder.layer_strides is None:
            return [ids]
        strides = text_encoder.layer_strides[ids]
        if not bool(strides.any()):
            return [ids]
        return [ids + index * strides for index in range(self._num_layer_copies)]

    def _cut_all(self, text: str) -> list[list[tokenizers.Chunk]]:
        """Return a text's chunks for each encoder, at most --max_embeddings_multiples; warn about more."""
        warn_of_unknown(text, self._known, _LOADER)
        parts = tokenizers.parse_weights(text)
        by_tower = [
            tokenizers.cut_into_chunks(parts, text_encoder.tokenize) for text_encoder in self._text_encoders
        ]
        longest = max(range(len(by_tower)), key=lambda index: len(by_tower[index]))
        warn_of_unused(parts, self._text_encoders[longest].tokenize, len(by_tower[longest]), self._most)
        return [chunks[: self._most] for chunks in by_tower]


def warn_of_unused(
    parts: Sequence[tokenizers.Part], tokenize: Callable[[str], list[int]], count: int, maximum: int
) -> None:
    """Warn about a prompt that is too long, quoting the end that is not used.

    Args:
        parts: Parts of the text with their weights.
        tokenize: Returns the tokens of a text.
        count: Number of chunks of the text.
        maximum: Maximum number of chunks.
    """
    if count > maximum:
        logger.warning(
            "a text is cut after %d tokens; this end of it is not read: %s\n  Give "
            "--max_embeddings_multiples %d to read all of it",
            tokenizers.SIZE * maximum,
            shorten(tokenizers.cut_text(parts, tokenize, maximum), SHOWN),
            count,
        )


def weights_of(chunks: Sequence[tokenizers.Chunk]) -> list[float]:
    """Return the weight of each state of a text; start, end and padding tokens have weight 1."""
    weights = [1.0]
    for chunk in chunks:
        padding = tokenizers.SIZE - len(chunk.ids)
        weights += [*chunk.weights, *[1.0] * padding]
    weights.append(1.0)
    return weights


def join_chunks(states: Tensor) -> Tensor:
    """Concatenate the states of K chunks to 75 K + 2, without start and end states between chunks.

    Args:
        states: States of each chunk, K 77 C.
    """
    return torch.cat([states[0, :1], *(chunk[1:-1] for chunk in states), states[-1, -1:]])


def weigh_states(states: Tensor, weights: Sequence[float], mode: str) -> Tensor:
    """Multiply states by weights; the modes "original" and "abs" then restore their mean by scaling.

    The result is computed in float32 and rounded once. If all weights are 1, the states are returned
    unchanged.

    Args:
        states: States, L C.
        weights: Weight of each token, L.
        mode: "original" restores the mean, "abs" the mean of absolute values, "none" neither.
    """
    if all(weight == 1 for weight in weights):
        return states
    unweighted = states.float()
    weighted = unweighted * torch.tensor(weights, device=states.device)[:, None]
    if mode == "original":
        weighted = weighted * _divide_or_one(unweighted.mean(), weighted.mean())
    elif mode == "abs":
        weighted = weighted * _divide_or_one(unweighted.abs().mean(), weighted.abs().mean())
    return weighted.to(states.dtype)


def _divide_or_one(number: Tensor, divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1.0, number / divisor)


def check_texts(
    options: TextOptions,
    kind: ModelKind,
    configs: Sequence[ClipTextConfig],
    layers: Sequence[str] = (),
    lora_words: Sequence[LearnedWord] = (),
) -> None:
    """Compare options with a checkpoint's text encoders before these are loaded.

    Args:
        options: Options of texts.
        kind: Kind of the checkpoint.
        configs: Dimensions of the text encoders.
        layers: Names of the U-Net's cross-attentions, with --XTI_embeddings.
        lora_words: Words in the files of LoRAs.

    Raises:
        OptionError: If an encoder lacks the layer of --clip_skip, or if SDXL is used with --XTI_embeddings.
        CheckpointError: If embeddings cannot be read, or do not fit the text encoders.
    """
    for config in configs:
        check_layer(options.clip_skip, config.num_layers, kind)
    if options.XTI_embeddings and kind is SDXL:
        raise OptionError(
            f"--XTI_embeddings: such files are made for the cross-attentions of {SD1.title} and {SD2.title}, "
            f"and this is {kind.title}. Use --textual_inversion_embeddings"
        )
    words = (*_read_words(options, layers), *lora_words)
    check_words(words, [config.dim for config in configs], kind)


def _read_words(options: TextOptions, layers: Sequence[str]) -> tuple[LearnedWord, ...]:
    return read_words(options.textual_inversion_embeddings or (), options.XTI_embeddings or (), layers)


def check_layer(clip_skip: int | None, layers: int, kind: ModelKind) -> None:
    """Raise OptionError if --clip_skip exceeds the number of layers of the text encoder."""
    if clip_skip is not None and clip_skip > layers:
        raise OptionError(
            f"--clip_skip {clip_skip}: the text encoder of this {kind.title} has {layers} layers. Give 1 to "
            f"{layers}"
        )


def _select_layer(text_encoder: LoadedTextEncoder, kind: ModelKind, clip_skip: int | None) -> int:
    """Return the layer to take hidden states from, counted from the last layer of the loaded network.

    --clip_skip counts layers of the loaded network, as in sd-scripts, but its default counts layers of the
    published one. So the default is 1 for Stable Diffusion 2, which is loaded without OpenCLIP's last layer.
    """
    check_layer(clip_skip, text_encoder.network.num_layers, kind)
    return default_layer(kind, text_encoder.missing_layers) if clip_skip is None else clip_skip


def default_layer(kind: ModelKind, missing_layers: int) -> int:
    """Return the default layer for hidden states, counted from the end of the loaded network.

    Args:
        kind: Kind of the checkpoint.
        missing_layers: Number of last layers that are not loaded.
    """
    return max(1, kind.clip_skip - missing_layers)


# CLIP vision conditioning (--clip_vision_strength): an image's vector in place of the text's pooled state.
#
# SDXL's second text encoder is that of OpenCLIP's bigG, whose image tower makes vectors of the same kind. The
# image's vector, times the strength, replaces the pooled state of the prompt; the negative prompt keeps its
# own.
OPTION = "--clip_vision_strength"
FOLDER = "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"  # in --tokenizer_cache_dir
REPOSITORY = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
RELEASE = f"the files config.json and model*.safetensors of {REPOSITORY}"
_NAMES = (  # names of the file; the folder may also contain other models
    "model.safetensors.index.json",
    "model.safetensors",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
)
_ON_HUB = ("model.safetensors.index.json", "model-*.safetensors", "config.json")


class ImageVectors:
    """CLIP image embeddings that replace pooled text states; the encoder is loaded for the first image."""

    def __init__(self, model: Model, tokenizer_cache_dir: Path | None, strength: float) -> None:
        """Find the image encoder's files, which are loaded for the first image.

        Raises OptionError if the checkpoint is not SDXL, or DownloadError if the files cannot be downloaded.
        """
        self._path = check_vision(model.kind, model.path, tokenizer_cache_dir)
        self._model = model
        self._strength = strength
        self._tower: ClipVision | None = None
        self._vectors: dict[Path, Tensor] = {}

    def replace_pooled(self, states: Sequence[TextState], pictures: Sequence[Path]) -> list[TextState]:
        """Return the states of prompts with their pooled states replaced by vectors of images, one for each.

        Each image is encoded alone, so its vector does not depend on others, and only once in a run.

        Raises:
            CheckpointError: If the image encoder's files are damaged or do not fit the model.
        """
        new_paths = [path for path in dict.fromkeys(pictures) if path not in self._vectors]
        device = self._model.device
        if new_paths:
            if self._tower is None:
                self._tower = self._load_tower()
            text_encoder = self._tower.to(device)
            for path in new_paths:
                image = Image.fromarray(first_frame(path))
                self._vectors[path] = text_encoder.encode([image])[0] * self._strength
            if device.type != "cpu":
                text_encoder.to("cpu")  # frees the device's memory for the U-Net
        return [
            replace(state, pooled=self._vectors[path]) for state, path in zip(states, pictures, strict=True)
        ]

    def _load_tower(self) -> ClipVision:
        """Load the image encoder, whose vectors replace the pooled states of the last text encoder.

        A pooled state is one vector for a whole prompt. Raises CheckpointError if the image encoder's vectors
        have another width.
        """
        model = self._model
        text_encoder = load_clip_vision(
            self._path, model.device, dtype=model.dtype, option=OPTION, release=RELEASE
        )
        logger.info("CLIP vision conditioning: %s", self._path)
        width = text_encoder.visual_projection.out_features
        text = model.text_encoders[-1].network
        pooled_width = text.embeddings.token_embedding.embedding_dim
        if text.text_projection is not None:
            pooled_width = text.text_projection.out_features
        if width != pooled_width:
            raise CheckpointError(
                f"{OPTION}: the image encoder {self._path} makes vectors of {width} numbers, the pooled "
                f"state of {model.path} has {pooled_width}. Give {RELEASE}.",
                self._path,
            )
        return text_encoder


def check_vision(kind: ModelKind, checkpoint: Path, tokenizer_cache_dir: Path | None) -> Path:
    """Return the path of the OpenCLIP bigG image encoder, whose image embedding replaces SDXL's pooled text.

    Raises:
        OptionError: If the checkpoint is not SDXL.
        DownloadError: If the file has to be downloaded and cannot be.
    """
    if kind is not SDXL:
        raise OptionError(
            f"{OPTION}: {checkpoint} is {kind.title}, which has no pooled state to replace. Use it with "
            f"{SDXL.title}"
        )
    return find_image_tower(checkpoint, tokenizer_cache_dir)


def find_image_tower(checkpoint: Path, tokenizer_cache_dir: Path | None) -> Path:
    """Find OpenCLIP bigG's image encoder: in --tokenizer_cache_dir, by the checkpoint, or in the hub's cache.

    If it is in none of these, it is downloaded.

    Args:
        checkpoint: File or folder of --ckpt.
        tokenizer_cache_dir: Folder with downloaded tokenizers; None if there is none.

    Raises:
        DownloadError: If the download fails.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    places = [folder / "image_encoder"]
    if tokenizer_cache_dir is not None:
        places.insert(0, tokenizer_cache_dir / FOLDER)
    for candidate in places:
        file = next((candidate / name for name in _NAMES if (candidate / name).is_file()), None)
        if file is not None:
            return file
    missing = " or ".join(str(candidate) for candidate in places)
    logger.info("%s: no image encoder in %s; taking %s of the hub (10 GB)", OPTION, missing, REPOSITORY)
    try:
        return find_model_folder(OPTION, REPOSITORY, _ON_HUB) / _ON_HUB[0]
    except DownloadError as error:
        raise DownloadError(
            f"{OPTION} needs the image encoder of OpenCLIP's bigG, which is not in {missing}. Put {RELEASE} "
            f"there.\n  {error}"
        ) from error
