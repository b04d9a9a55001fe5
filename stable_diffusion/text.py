"""Encode prompts: weights, chunks, concatenated states, and the pooled state or an image vector instead.

Each text is encoded alone, with all of its chunks in one pass of each encoder, so that its state depends on
no other text. States are cached, because most images share their negative prompt.
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
from generation.embedding_marks import warn_about_unknown_words
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
MAX_CACHED_TEXTS = 64  # cached texts; an SDXL text of one chunk takes 0.6 MB in float32
MAX_QUOTED = 200  # characters of a text in a warning


class PromptEncoder:
    """Encode prompts with a model's text encoders and the text options."""

    def __init__(
        self,
        text_encoders: Sequence[LoadedTextEncoder],
        kind: ModelKind,
        options: TextOptions,
        cross_attentions: Sequence[str] = (),
        lora_words: Sequence[LearnedWord] = (),
    ) -> None:
        """Add learned words to the encoders, whose token embeddings get new rows.

        Args:
            text_encoders: Text encoders of the checkpoint.
            kind: Kind of the checkpoint.
            options: Text options.
            cross_attentions: Names of the U-Net's cross-attentions, with --XTI_embeddings. A text then has
                states for each of these, concatenated.
            lora_words: Words in LoRA files.

        Raises:
            OptionError: If an encoder lacks the layer of --clip_skip.
            CheckpointError: If vectors do not fit an encoder, or if a word already exists as a token.
        """
        words = merge_lora_words(_read_words(options, cross_attentions), lora_words)
        self._text_encoders = add_words(text_encoders, kind, words)
        self._known_words = [*list_ids(words, 0)]  # the words, without their ids
        self._num_layer_copies = max(len(cross_attentions), 1)  # number of copies of a text's states
        self._kind = kind
        self._weighting_mode = options.emb_normalize_mode
        self._max_chunks = options.max_embeddings_multiples or 1
        self._hidden_layers = [  # per encoder: the layer to take states from, counted from the end
            _select_layer(encoder, kind, options.clip_skip) for encoder in self._text_encoders
        ]
        # token ids take far less memory than states, so cache more of them
        self._cut_into_chunks_cached = lru_cache(4 * MAX_CACHED_TEXTS)(self._cut_into_chunks)
        self._encode_cached = lru_cache(MAX_CACHED_TEXTS)(self._encode)

    def count_chunks(self, text: str) -> int:
        """Return the number of 75-token chunks in a text, between 1 and the limit."""
        return max(len(chunks) for chunks in self._cut_into_chunks_cached(text))

    def encode(self, text: str, chunks: int | None = None, networks: Hashable = None) -> TextState:
        """Return the text encoder states of a prompt. They are cached: do not modify them in place.

        Weights are applied to each encoder's states separately. The pooled state (SDXL) is the last encoder's
        for the first chunk, without weights.

        Args:
            text: The prompt.
            chunks: Number of chunks to pad to; None for no padding.
            networks: Cache key of anything else that affects the result, such as text encoder LoRA strengths.
        """
        chunks = self.count_chunks(text) if chunks is None else chunks
        return self._encode_cached(text, chunks, networks)

    @torch.no_grad()
    def _encode(self, text: str, num_chunks: int, _cache_key: Hashable) -> TextState:
        """Encode a prompt as `num_chunks` chunks with all text encoders, and concatenate their states."""
        chunks_by_encoder = self._cut_into_chunks_cached(text)
        contexts: list[Tensor] = []
        pooled = None
        for encoder, layer, chunks in zip(
            self._text_encoders, self._hidden_layers, chunks_by_encoder, strict=True
        ):
            if len(chunks) > num_chunks:
                raise ValueError(f"{len(chunks)} chunks do not fit into {num_chunks}")
            padding = [tokenizers.Chunk()] * (num_chunks - len(chunks))
            context, pooled = self._encode_chunks(encoder, layer, [*chunks, *padding])
            contexts.append(context)
        return TextState(torch.cat(contexts, dim=-1), None if pooled is None else pooled[0])

    def _encode_chunks(
        self, encoder: LoadedTextEncoder, layer: int, chunks: Sequence[tokenizers.Chunk]
    ) -> tuple[Tensor, Tensor | None]:
        """Return a prompt's states in one encoder, L C, joined over chunks; for SDXL also pooled states."""
        # With --XTI_embeddings, the states for all cross-attentions are concatenated.
        is_xl = self._kind is SDXL
        rows = [
            tokenizers.fill_chunk(
                chunk.ids, start=encoder.bos_token_id, end=encoder.eos_token_id, pad=encoder.pad_token_id
            )
            for chunk in chunks
        ]
        device = encoder.network.device
        end_positions: Tensor | None = None  # where pooled states are taken: only from SDXL's last encoder
        if is_xl and encoder is self._text_encoders[-1]:
            # the first end token of each chunk, which may be a <|endoftext|> in the text itself
            end_positions = torch.tensor([row.index(encoder.eos_token_id) for row in rows]).to(device)
        ids_by_layer = self._list_ids_by_layer(encoder, torch.tensor(rows))
        states, pooled = encoder.network.states(
            torch.cat(ids_by_layer).to(device), layer, final_norm=not is_xl, ends=end_positions
        )
        weights = list_token_weights(chunks)
        states_by_layer = [
            apply_token_weights(join_chunk_states(chunk_states), weights, self._weighting_mode)
            for chunk_states in states.chunk(len(ids_by_layer))
        ]
        # all cross-attentions share the states unless a word has vectors for each of them
        repeats = self._num_layer_copies // len(ids_by_layer)
        return torch.cat(states_by_layer * repeats), pooled

    def _list_ids_by_layer(self, encoder: LoadedTextEncoder, ids: Tensor) -> list[Tensor]:
        """Return token ids, K 77: one tensor, or one per cross-attention if a word has vectors for each."""
        if encoder.layer_strides is None:
            return [ids]
        strides = encoder.layer_strides[ids]
        if not bool(strides.any()):
            return [ids]
        return [ids + index * strides for index in range(self._num_layer_copies)]

    def _cut_into_chunks(self, text: str) -> list[list[tokenizers.Chunk]]:
        """Return a text's chunks for each encoder, at most --max_embeddings_multiples; warn about a cut."""
        warn_about_unknown_words(text, self._known_words, _LOADER)
        parts = tokenizers.parse_weights(text)
        chunks_by_encoder = [
            tokenizers.cut_into_chunks(parts, encoder.tokenize) for encoder in self._text_encoders
        ]
        num_chunks = [len(chunks) for chunks in chunks_by_encoder]
        longest = num_chunks.index(max(num_chunks))
        warn_if_truncated(parts, self._text_encoders[longest].tokenize, max(num_chunks), self._max_chunks)
        return [chunks[: self._max_chunks] for chunks in chunks_by_encoder]


def warn_if_truncated(
    parts: Sequence[tokenizers.WeightedText],
    tokenize: Callable[[str], list[int]],
    num_chunks: int,
    max_chunks: int,
) -> None:
    """Warn about a truncated prompt, quoting the unused end.

    Args:
        parts: Parts of the text with their weights.
        tokenize: Returns the tokens of a text.
        num_chunks: Number of chunks of the text.
        max_chunks: Number of chunks that are used.
    """
    if num_chunks > max_chunks:
        logger.warning(
            "a text is cut after %d tokens; the rest is not read: %s\n  Pass --max_embeddings_multiples %d "
            "to read all of it",
            tokenizers.CHUNK_SIZE * max_chunks,
            shorten(tokenizers.find_cut_off_text(parts, tokenize, max_chunks), MAX_QUOTED),
            num_chunks,
        )


def list_token_weights(chunks: Sequence[tokenizers.Chunk]) -> list[float]:
    """Return one prompt weight per state of a text; start, end and padding tokens have weight 1."""
    weights = [1.0]
    for chunk in chunks:
        padding = tokenizers.CHUNK_SIZE - len(chunk.ids)
        weights += [*chunk.weights, *[1.0] * padding]
    weights.append(1.0)
    return weights


def join_chunk_states(states: Tensor) -> Tensor:
    """Concatenate the states of K chunks to 75 K + 2, without start and end states between chunks.

    Args:
        states: States of each chunk, K 77 C.
    """
    return torch.cat([states[0, :1], *(chunk[1:-1] for chunk in states), states[-1, -1:]])


def apply_token_weights(states: Tensor, weights: Sequence[float], mode: str) -> Tensor:
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
    cross_attentions: Sequence[str] = (),
    lora_words: Sequence[LearnedWord] = (),
) -> None:
    """Check text options against a checkpoint's text encoders before these are loaded.

    Args:
        options: Options of texts.
        kind: Kind of the checkpoint.
        configs: Dimensions of the text encoders.
        cross_attentions: Names of the U-Net's cross-attentions, with --XTI_embeddings.
        lora_words: Words in LoRA files.

    Raises:
        OptionError: If an encoder lacks the layer of --clip_skip, or if SDXL is used with --XTI_embeddings.
        CheckpointError: If embeddings cannot be read, or do not fit the text encoders.
    """
    for config in configs:
        check_layer(options.clip_skip, config.num_layers, kind)
    if options.XTI_embeddings and kind is SDXL:
        raise OptionError(
            f"--XTI_embeddings: such files are made for the cross-attentions of {SD1.title} and "
            f"{SD2.title}, but this is {kind.title}. Use --textual_inversion_embeddings"
        )
    words = (*_read_words(options, cross_attentions), *lora_words)
    check_words(words, [config.dim for config in configs], kind)


def _read_words(options: TextOptions, cross_attentions: Sequence[str]) -> tuple[LearnedWord, ...]:
    return read_words(
        options.textual_inversion_embeddings or (), options.XTI_embeddings or (), cross_attentions
    )


def check_layer(clip_skip: int | None, num_layers: int, kind: ModelKind) -> None:
    """Raise OptionError if --clip_skip exceeds the number of layers of the text encoder."""
    if clip_skip is not None and clip_skip > num_layers:
        raise OptionError(
            f"--clip_skip {clip_skip}: the text encoder of this {kind.title} has {num_layers} layers. Pass 1 "
            f"to {num_layers}"
        )


def _select_layer(text_encoder: LoadedTextEncoder, kind: ModelKind, clip_skip: int | None) -> int:
    """Return the layer to take hidden states from, counted from the last layer of the loaded network."""
    # --clip_skip counts layers of the loaded network, as in sd-scripts, but its default counts layers of the
    # published one. So the default is 1 for Stable Diffusion 2, which is loaded without OpenCLIP's last
    # layer.
    check_layer(clip_skip, text_encoder.network.num_layers, kind)
    return default_layer(kind, text_encoder.missing_layers) if clip_skip is None else clip_skip


def default_layer(kind: ModelKind, missing_layers: int) -> int:
    """Return the default hidden-state layer, counted from the end of the loaded network.

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
_FILE_NAMES = (  # names of the file; the folder may also contain other models
    "model.safetensors.index.json",
    "model.safetensors",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
)
_ON_HUB = ("model.safetensors.index.json", "model-*.safetensors", "config.json")


class ImageVectors:
    """CLIP image embeddings that replace pooled text states. The encoder is loaded for the first image."""

    def __init__(self, model: Model, tokenizer_cache_dir: Path | None, strength: float) -> None:
        """Find the image encoder's files, which are loaded for the first image.

        Raises OptionError if the checkpoint is not SDXL, or DownloadError if the download fails.
        """
        self._path = check_vision(model.kind, model.path, tokenizer_cache_dir)
        self._model = model
        self._strength = strength
        self._image_encoder: ClipVision | None = None
        self._vectors: dict[Path, Tensor] = {}

    def replace_pooled(self, states: Sequence[TextState], paths: Sequence[Path]) -> list[TextState]:
        """Replace each prompt's pooled state with an image's CLIP embedding (--clip_vision_strength).

        Each image is encoded alone, so its vector does not depend on others, and only once per run.

        Raises:
            CheckpointError: If the image encoder's files are damaged or do not fit the model.
        """
        new_paths = [path for path in dict.fromkeys(paths) if path not in self._vectors]
        device = self._model.device
        if new_paths:
            if self._image_encoder is None:
                self._image_encoder = self._load_image_encoder()
            image_encoder = self._image_encoder.to(device)
            for path in new_paths:
                image = Image.fromarray(first_frame(path))
                self._vectors[path] = image_encoder.encode([image])[0] * self._strength
            if device.type != "cpu":
                image_encoder.to("cpu")  # frees the device's memory for the U-Net
        return [replace(state, pooled=self._vectors[path]) for state, path in zip(states, paths, strict=True)]

    def _load_image_encoder(self) -> ClipVision:
        """Load the image encoder, whose vectors replace the last text encoder's pooled states."""
        model = self._model
        image_encoder = load_clip_vision(
            self._path, model.device, dtype=model.dtype, option=OPTION, release=RELEASE
        )
        logger.info("CLIP vision conditioning: %s", self._path)
        width = image_encoder.visual_projection.out_features
        text_network = model.text_encoders[-1].network
        pooled_width = text_network.embeddings.token_embedding.embedding_dim
        if text_network.text_projection is not None:
            pooled_width = text_network.text_projection.out_features
        if width != pooled_width:
            raise CheckpointError(
                f"{OPTION}: the image encoder {self._path} produces vectors of width {width}, but the pooled "
                f"state of {model.path} has width {pooled_width}. Pass {RELEASE}.",
                self._path,
            )
        return image_encoder


def check_vision(kind: ModelKind, checkpoint: Path, tokenizer_cache_dir: Path | None) -> Path:
    """Return the path of the OpenCLIP bigG image encoder, whose image embedding replaces SDXL's pooled text.

    Raises:
        OptionError: If the checkpoint is not SDXL.
        DownloadError: If the file is missing and its download fails.
    """
    if kind is not SDXL:
        raise OptionError(
            f"{OPTION}: {checkpoint} is {kind.title}, which has no pooled state to replace. Use it with "
            f"{SDXL.title}"
        )
    return find_image_encoder(checkpoint, tokenizer_cache_dir)


def find_image_encoder(checkpoint: Path, tokenizer_cache_dir: Path | None) -> Path:
    """Find OpenCLIP bigG's image encoder in --tokenizer_cache_dir, near the checkpoint, or in the hub cache.

    If it is in none of these, it is downloaded.

    Args:
        checkpoint: File or folder of --ckpt.
        tokenizer_cache_dir: Folder with downloaded tokenizers; None if there is none.

    Raises:
        DownloadError: If the download fails.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    candidates = [folder / "image_encoder"]
    if tokenizer_cache_dir is not None:
        candidates.insert(0, tokenizer_cache_dir / FOLDER)
    for candidate in candidates:
        for name in _FILE_NAMES:
            if (candidate / name).is_file():
                return candidate / name
    missing = " or ".join(str(candidate) for candidate in candidates)
    logger.info("%s: no image encoder in %s; using %s from the hub (10 GB)", OPTION, missing, REPOSITORY)
    try:
        return find_model_folder(OPTION, REPOSITORY, _ON_HUB) / _ON_HUB[0]
    except DownloadError as error:
        raise DownloadError(
            f"{OPTION} needs the image encoder of OpenCLIP's bigG, which is not in {missing}. Put {RELEASE} "
            f"there.\n  {error}"
        ) from error
