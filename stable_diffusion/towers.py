"""The text encoders of a checkpoint for training and caching: they turn a caption into token states.

A caption is cut or padded to 75 n tokens, in n chunks between start and end token. The states of its chunks
are concatenated: the start state of the first, 75 of each, the end state of the last. The pooled state of
SDXL's second encoder is that of the first end token of the first chunk. Sample prompts are parsed as in
gen_img.py: brackets set weights, BREAK begins a chunk, and there are only as many chunks as the longer
of prompt and negative prompt needs. LoRAs are attached to the linear layers of `encoder.layers`.
"""
# Letters: B captions, K chunks, C width

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from checkpoints.opening import fingerprint
from encoders.clip_checkpoints import CLIP_TOKENS
from encoders.clip_l import ClipWords, load_clip_words
from encoders.clip_layers import ClipText
from encoders.new_words import GrowingEmbedding, NewWord
from modules.console import quiet
from modules.devices import dtype_name
from protocols.data import Conditions
from protocols.family import EncoderAbilities
from protocols.requests import Prompt
from protocols.rules import CountTokens, TextPiece, TokenCount
from runtime.offload.block_swap import move_network
from runtime.offload.host_memory import LoadedNetwork
from stable_diffusion import tokenizers
from stable_diffusion.contract import SD2, SDXL, text_encoder_name
from stable_diffusion.options import TextOptions
from stable_diffusion.text import (
    apply_token_weights,
    check_layer,
    default_layer,
    join_chunk_states,
    list_token_weights,
    warn_if_truncated,
)
from stable_diffusion.text_checkpoints import TextPlan
from stable_diffusion.textual_inversion import (
    LearnedWord,
    extend_token_embedding,
    list_ids,
    tokenize_with_words,
)
from stable_diffusion.tokenizers import (
    OPEN_CLIP_PAD,
    Chunk,
    WeightedText,
    check_vocabulary,
    cut_into_chunks,
    parse_weights,
)
from stable_diffusion.training_files import TrainingFiles

STATES, STATES_1, STATES_2, POOLED = "hidden_state", "hidden_state1", "hidden_state2", "pool2"  # in caches
WEIGHTING_MODE = TextOptions.from_defaults().emb_normalize_mode  # how gen_img.py rescales weighted states
# keys of each encoder's states in caches, by the number of encoders of a model
_CACHE_KEYS = {1: (frozenset({STATES}),), 2: (frozenset({STATES_1}), frozenset({STATES_2, POOLED}))}


@dataclass(frozen=True)
class LoadedTokenizer:
    """Tokenizer and settings of a loaded text encoder."""

    tokenizer: ClipWords
    pad: int
    layer: int  # layer whose states are used, counted from the end


@dataclass(frozen=True)
class TextEncoderTraining:
    """Which text encoders and new words are trained, their dtypes, and the padding of captions."""

    dtypes: Mapping[str, torch.dtype]  # dtype of each trained encoder, by name
    # whether captions are padded to whole chunks; else to the longest caption of a batch
    pads_captions: bool = True
    word: NewWord | None = None  # the word that is trained
    # for a word with separate vectors for each cross-attention of the U-Net: paths of the transformers
    # around the cross-attentions, by their names in files; {} if all use the same vectors
    cross_attentions: Mapping[str, str] = field(default_factory=dict)


class LazyTextEncoder:
    """One text encoder of a checkpoint and its tokenizer, loaded on demand."""

    abilities: ClassVar[EncoderAbilities] = EncoderAbilities(trainable=True, accepts_new_words=True)
    variable_length: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        files: TrainingFiles,
        index: int,
        max_chunks: int = 1,
        clip_skip: int | None = None,
        warns_if_cut: bool = False,
        text_training: TextEncoderTraining | None = None,
        lora_words: Sequence[LearnedWord] = (),
    ) -> None:
        """Describe an encoder; `load` reads its weights.

        Args:
            files: Files of the checkpoint.
            index: Index of the encoder in the checkpoint.
            max_chunks: Number of 75-token chunks to which texts are padded or cut.
            clip_skip: Value of --clip_skip; None for the layer that the model was trained with.
            warns_if_cut: Whether to warn about truncated prompts.
            text_training: How the weights are trained; None if they are frozen.
            lora_words: Words in LoRA files.
        """
        lora_prefixes = files.kind.lora_prefixes
        num_encoders = len(lora_prefixes)
        self.files = files
        self.lora_prefix = lora_prefixes[index]
        self.keys = _CACHE_KEYS[num_encoders][index]
        self.name = text_encoder_name(index)
        self._index = index
        self._max_chunks = max_chunks
        self._clip_skip = clip_skip
        self._warns_if_cut = warns_if_cut
        self._dtype = files.dtype
        self._pads_captions = True  # to whole chunks
        self._new_word: NewWord | None = None  # the word that is trained
        # copies of a text's states: one for each cross-attention if the new word has vectors for each
        self._num_layer_copies = 1
        self._lora_words = lora_words
        if text_training is not None:
            self._dtype = text_training.dtypes.get(self.name, files.dtype)
            self._pads_captions = text_training.pads_captions
            self._new_word = text_training.word
            self._num_layer_copies = max(len(text_training.cross_attentions), 1)
        self._loaded = LoadedNetwork[ClipText, LoadedTokenizer]()

    @property
    def network(self) -> ClipText:
        """The loaded network; call `load` first."""
        return self._loaded.get()[0]

    def reads_weight(self, name: str) -> bool:
        """Return whether the outputs depend on a weight; layers after the last used state do not matter.

        The checkpoint's header is read on the first call.
        """
        if POOLED in self.keys:
            return True
        if name.startswith("final_layer_norm."):
            return self.files.kind is not SDXL
        layer = re.match(r"encoder\.layers\.(\d+)\.", name)
        return layer is None or int(layer[1]) < self._num_used_layers

    @cached_property
    def _num_used_layers(self) -> int:
        """Return the number of layers to run: up to the last one whose hidden states are used."""
        with self.files.open_plan() as checkpoint_plan:
            plan = checkpoint_plan.text_encoders[self._index]
            return plan.load_plan.config.num_layers + 1 - self._select_layer(plan)

    @property
    def identity(self) -> Mapping[str, str]:
        """Return the files and settings that encoded texts depend on, for cache records; reads a few MB."""
        with self.files.open_plan() as checkpoint_plan:
            plan = checkpoint_plan.text_encoders[self._index]
            checkpoint = fingerprint(plan.load_plan.checkpoint.path)
            layer = self._select_layer(plan)
            are_open_clip = [text.is_open_clip for text in checkpoint_plan.text_encoders]
        cache_dir = self.files.tokenizer_cache_dir
        sources = tokenizers.find_tokenizer_files(cache_dir, self.files.path, are_open_clip)
        source, file = sources[self._index]
        identity = {
            self.name: checkpoint,
            f"{self.name}_tokenizer": source.identity(file),
            f"{self.name}_layer": str(layer),
            f"{self.name}_chunks": str(self._max_chunks),
            f"{self.name}_dtype": dtype_name(self._dtype),
        }
        if not self._pads_captions:
            identity[f"{self.name}_fills"] = "no"
        return identity

    def token_counter(self) -> CountTokens:
        """Return a function that counts the tokens of a text, including start and end token.

        Weights are not loaded.

        Raises:
            CheckpointError: If there is no local tokenizer; none is downloaded.
        """
        with self.files.open_plan() as checkpoint_plan:
            are_open_clip = [text.is_open_clip for text in checkpoint_plan.text_encoders]
            vocabulary = checkpoint_plan.text_encoders[self._index].load_plan.config.vocabulary
        path = self.files.path
        sources = tokenizers.find_tokenizer_files(self.files.tokenizer_cache_dir, path, are_open_clip)
        # a text encoder may use the tokenizer of an earlier one: all have the same vocabulary
        local = [(source, file) for source, file in sources[self._index :: -1] if file is not None]
        source, file = local[0] if local else sources[0]
        if file is None:
            file = source.download(path, may_download=False)
        tokenizer = self._add_words_to_tokenizer(load_clip_words(source, file), vocabulary)
        max_tokens = tokenizers.CHUNK_SIZE * self._max_chunks  # without start and end token

        def count(text: str) -> TokenCount:
            ids = tokenizer.tokenize(text)
            num_tokens = len(ids)
            num_read = len(text)  # characters that fit
            if num_tokens > max_tokens:
                # The number of leading characters, in whole words, that fit into `max_tokens` tokens
                ends = [match.end() for match in re.finditer(r"\S+", text)]
                num_words = bisect_right(
                    ends, max_tokens, key=lambda end: len(tokenizer.tokenize(text[:end]))
                )
                num_read = ends[num_words - 1] if num_words else 0
            return TokenCount(
                text,
                tokens=num_tokens + 2,
                limit=max_tokens + 2,
                num_read=num_read,
                pieces=tuple(TextPiece(token, tokenizer.token_text(token)) for token in ids),
            )

        return count

    def load(self, device: torch.device) -> None:
        """Load encoder and tokenizer, or move a loaded encoder to the device."""
        self._loaded.load(device, self._load_network, move_network)

    def _load_network(self, device: torch.device) -> tuple[ClipText, LoadedTokenizer]:
        """Load a text encoder and its tokenizer, with embedding rows for a trained word and LoRAs' words."""
        with self.files.open_plan() as checkpoint_plan:
            plan = checkpoint_plan.text_encoders[self._index]
            layer = self._select_layer(plan)
            tokenizer = self.files.tokenizers[self._index]
            vocabulary = plan.load_plan.config.vocabulary
            check_vocabulary(tokenizer, vocabulary, self.files.path)
            network = self.files.load_text(plan, device, self._dtype)
        table = network.embeddings.token_embedding
        if self._new_word is not None:
            table = GrowingEmbedding(table, self._new_word.count * self._num_layer_copies)
        if self._lora_words:
            table = extend_token_embedding(table, self._lora_words, self._index)
        network.embeddings.token_embedding = table
        tokenizer = self._add_words_to_tokenizer(tokenizer, vocabulary)
        pad = OPEN_CLIP_PAD if plan.is_open_clip else tokenizer.end
        return network, LoadedTokenizer(tokenizer, pad, layer)

    def _add_words_to_tokenizer(self, tokenizer: ClipWords, vocabulary: int) -> ClipWords:
        """Add new words to a tokenizer and return it."""
        ids = self._list_words(vocabulary)
        return replace(tokenizer, tokenize=tokenize_with_words(tokenizer.tokenize, ids)) if ids else tokenizer

    def _list_words(self, vocabulary: int) -> dict[str, list[int]]:
        """Return the token ids of each new word, keyed by the word."""
        if self._new_word is not None:
            return self._new_word.list_ids(vocabulary)
        return list_ids(self._lora_words, vocabulary) if self._lora_words else {}

    def _select_layer(self, plan: TextPlan) -> int:
        """Return the hidden-state layer, counted from the end; raise OptionError if it does not exist."""
        kind = self.files.kind
        check_layer(self._clip_skip, plan.load_plan.config.num_layers, kind)
        return self._clip_skip or default_layer(kind, missing_layers=1 if kind is SD2 else 0)

    def count_chunks(self, text: str) -> int:
        """Return the number of 75-token chunks in a prompt with weights, at least 1.

        Raises CheckpointError or DownloadError if there is no tokenizer.
        """
        parts = parse_weights(text)
        tokenize = self._counting_tokenizer.tokenize
        chunks = cut_into_chunks(parts, tokenize)
        if self._warns_if_cut:
            warn_if_truncated(parts, tokenize, len(chunks), self._max_chunks)
        return min(len(chunks), self._max_chunks)

    @cached_property
    def _counting_tokenizer(self) -> ClipWords:
        """Tokenizer for counting the tokens of captions; no network is loaded."""
        with self.files.open_plan() as checkpoint_plan:
            are_open_clip = [text.is_open_clip for text in checkpoint_plan.text_encoders]
            vocabulary = checkpoint_plan.text_encoders[self._index].load_plan.config.vocabulary
        cache_dir = self.files.tokenizer_cache_dir
        with quiet():  # the words are logged when the encoder is loaded
            found = tokenizers.load_tokenizers(cache_dir, self.files.path, are_open_clip)
        return self._add_words_to_tokenizer(found[self._index], vocabulary)

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Encode prompts; return each one's tensors (`keys`) on the CPU, with gradients for trained parts.

        If `Prompt.max_chunks` is set, weights are parsed as in gen_img.py. All texts of a call are
        padded to the same number of chunks, or to the longest text if captions are not padded to chunks.
        """
        if not prompts:
            return []
        _, loaded_tokenizer = self._loaded.get()
        chunks_by_text = [self._cut_prompt(prompt, loaded_tokenizer) for prompt in prompts]
        length = None  # number of states that are used; None for all
        if not self._pads_captions and prompts[0].max_chunks is None:
            length = max(len(chunks[0].ids) for chunks in chunks_by_text) + 2  # with start and end token
        all_chunks = chain.from_iterable(chunks_by_text)
        states, pooled = self._run_encoder(
            [self._list_chunk_ids(chunk, loaded_tokenizer) for chunk in all_chunks]
        )
        # if a trained word has a vector for each cross-attention, each text has states for each of them
        states_by_layer = states.chunk(self._num_layer_copies)  # each: the chunks of all texts, 77 C
        states_key = next(key for key in self.keys if key != POOLED)
        results: list[Conditions] = []
        first_chunk = 0  # index of the text's first chunk
        for chunks in chunks_by_text:
            end_chunk = first_chunk + len(chunks)
            text_states = []
            for layer_states in states_by_layer:
                joined = apply_token_weights(
                    join_chunk_states(layer_states[first_chunk:end_chunk]),
                    list_token_weights(chunks),
                    WEIGHTING_MODE,
                )
                text_states.append(joined[:length])
            conditions = {states_key: torch.cat(text_states).cpu()}
            if pooled is not None:  # only the first chunk's pooled state is used
                conditions[POOLED] = pooled[first_chunk].cpu().clone()
            results.append(conditions)
            first_chunk = end_chunk
        return results

    def _run_encoder(self, chunk_ids: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        """Encode chunks of 77 token ids; return states, N 77 C, and for SDXL's last encoder pooled states."""
        # If a word has vectors for each cross-attention, the states for all cross-attentions are
        # concatenated.
        network, loaded = self._loaded.get()
        end_positions = None  # of the end tokens, whose states are the pooled ones
        if POOLED in self.keys:
            end_id = loaded.tokenizer.end
            end_positions = torch.tensor([ids.index(end_id) for ids in chunk_ids]).to(network.device)
        ids = torch.tensor(chunk_ids).to(network.device)
        if self._new_word is not None and self._num_layer_copies > 1:
            table = network.embeddings.token_embedding
            assert isinstance(table, GrowingEmbedding)
            # copy i of the ids is for cross-attention i: ids of the new word move to its rows for this one
            strides = (ids >= table.known) * self._new_word.count
            ids = torch.cat([ids + index * strides for index in range(self._num_layer_copies)])
        is_xl = self.files.kind is SDXL  # its U-Net takes states before the final norm
        return network.states(ids, loaded.layer, final_norm=not is_xl, ends=end_positions)

    def _cut_prompt(self, prompt: Prompt, loaded: LoadedTokenizer) -> list[Chunk]:
        """Return a prompt's token chunks with their weights, padded with empty chunks."""
        count = self._max_chunks if prompt.max_chunks is None else prompt.max_chunks
        if prompt.max_chunks is None:
            chunks = cut_into_chunks([WeightedText(prompt.text)], loaded.tokenizer.tokenize)
        else:
            chunks = cut_into_chunks(parse_weights(prompt.text), loaded.tokenizer.tokenize)
        return [*chunks[:count], *[Chunk()] * (count - len(chunks))]

    def _list_chunk_ids(self, chunk: Chunk, loaded: LoadedTokenizer) -> list[int]:
        """Return a chunk's 77 token ids, with start token, end token and padding."""
        tokenizer = loaded.tokenizer
        row = tokenizers.fill_chunk(chunk.ids, start=tokenizer.start, end=tokenizer.end, pad=loaded.pad)
        assert len(row) == CLIP_TOKENS
        return row

    def free(self) -> None:
        """Release the network and its tokenizer."""
        self._loaded.free()


def make_encoders(
    files: TrainingFiles,
    max_chunks: int,
    clip_skip: int | None,
    warns_if_cut: bool = False,
    text_training: TextEncoderTraining | None = None,
    lora_words: Sequence[LearnedWord] = (),
) -> list[LazyTextEncoder]:
    """Create the one or two text encoders of a checkpoint.

    Args:
        files: The checkpoint.
        max_chunks: Number of 75-token chunks to which texts are padded or cut.
        clip_skip: Layer to take states from, counted from the end; None for the kind's default.
        warns_if_cut: Whether to warn about truncated texts.
        text_training: The encoders that are trained; None if all are frozen.
        lora_words: Words whose vectors are stored in LoRA files.
    """
    encoders = []
    for index in range(len(files.kind.lora_prefixes)):
        encoder = LazyTextEncoder(
            files,
            index,
            max_chunks=max_chunks,
            clip_skip=clip_skip,
            warns_if_cut=warns_if_cut,
            text_training=text_training,
            lora_words=lora_words,
        )
        encoders.append(encoder)
    return encoders
