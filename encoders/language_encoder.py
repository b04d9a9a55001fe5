"""Language models as text encoders: prompt templates of families, and the hidden states that they take.

    settings = LanguageEncoderSettings(name="vl", states_key="vl_embed", model=QWEN25_VL, ...)
    encoder = LanguageModelEncoder(settings, path, torch.bfloat16)     # a TextEncoder of protocols
    encoder.encode(prompts)                                            # {"vl_embed": [L C]} for each

Source of the chat templates: the released tokenizers of Qwen3.
"""
# Letters: B prompts, L tokens, T tokens after padding, C width of the model, n layers whose states are read

import functools
import hashlib
import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from checkpoints.encoders import check_state_width
from checkpoints.model_files import inside, read_once, require_file
from checkpoints.opening import Checkpoint, open_checkpoint
from checkpoints.tokenizers import TokenizerFiles
from encoders.files import TransformerFiles
from encoders.language_models import (
    LanguageConfig,
    LanguageModel,
    all_states,
    load_language_model,
    plan_streamed_layers,
    read_language_model,
)
from encoders.language_states import language_states
from encoders.picture_prompts import (
    ImagePromptFormat,
    PatchedImages,
    PromptEmbeddings,
    embed_images,
    load_vision_tower,
    read_images,
    read_vision_tower,
)
from encoders.text_encoder import (
    FileTextEncoder,
    TemplatedPrompt,
    TextTokenizer,
    TokenizerSource,
    check_ids,
    fill_rows,
    find_merges,
)
from modules.devices import dtype_name, select_compute_dtype
from modules.errors import MediaError
from modules.speed_options import TextEncoderOptions, text_form
from protocols.data import Batch, Conditions
from protocols.family import EncoderAbilities, TextEncoder
from protocols.loading import BlockSharder
from protocols.requests import Prompt
from runtime.planning.device_memory import spare_bytes

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
PRE_NORM = "pre_norm"  # in cache records: the last state is the one before the final norm
# How Qwen splits a text before byte pairs are merged, and its special tokens. A tokenizer.json has both, a
# vocab.json has neither. Source: Yang et al. 2025, arXiv 2505.09388, and its released tokenizer
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>",
    "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
    "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip


def read_qwen_tokenizer(files: TokenizerFiles, file: Path) -> Tokenizer:
    """Read a Qwen tokenizer from tokenizer.json, or from vocab.json with merges.txt.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    merges = find_merges(file)
    # tokenizer.json contains everything
    if merges is None:
        return files.read(file)
    for part in (file, merges):
        files.check_bytes(part)
    with files.convert_errors(file):
        tokenizer = Tokenizer(models.BPE.from_file(str(file), str(merges)))
    # vocab.json and merges.txt lack these settings, which tokenizer.json contains
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _QWEN_TOKENS])
    return tokenizer


def qwen_tokenizer(option: str, repository: str) -> TokenizerSource:
    """Return where to look for a Qwen tokenizer.

    Args:
        option: Option that names the tokenizer.
        repository: Repository on the hub with the tokenizer.
    """
    files = TokenizerFiles(
        option,
        names=("tokenizer.json", "vocab.json"),
        folder="tokenizer",
        repository=repository,
        # in the folder of the encoder; in a subfolder of it; next to the folder text_encoder
        folders=(".", "qwen_3", "tokenizer", "../tokenizer"),
        unique_token="<|im_start|>",
    )
    return TokenizerSource(files, adds_own=False, read_file=read_qwen_tokenizer)


def qwen3_chat(thinks: bool) -> tuple[str, str]:
    """Return the text before and after a prompt in Qwen3's single-message chat template.

    Args:
        thinks: Whether the model may think before it answers (`enable_thinking` of the template).
    """
    answer = "<|im_start|>assistant\n" + ("" if thinks else "<think>\n\n</think>\n\n")
    return "<|im_start|>user\n", f"<|im_end|>\n{answer}"


# eq=False: hashed by identity, because mappings in it cannot be hashed and `read_once` caches by it
@dataclass(frozen=True, eq=False)
class LanguageEncoderSettings:
    """How a family uses a language model: the prompt template and the hidden states to return."""

    name: str  # name of the encoder in messages and cache records
    states_key: str  # key of the states in the conditions that `encode` returns
    model: LanguageModel
    source: TokenizerSource
    max_length: int  # longest prompt in tokens, without the template tokens whose states are dropped
    template_prefix: str = ""  # the template before the prompt
    template_suffix: str = ""  # the template after the prompt
    # Number of template tokens before the prompt whose states are dropped, with the model's own tokenizer.
    # None: the tokens of `system`, the start of `template_prefix`, are counted, or of all of it if that is ""
    num_dropped_tokens: int | None = 0
    system: str = ""
    empty_prompt_text: str = ""  # replaces an empty prompt
    strips_prompt: bool = False  # whether white space around a prompt is stripped
    # Hidden states that are concatenated, by the number of layers before them, ascending; or ALL_STATES. -1
    # is the last state after the final norm. -2 is the state before the last layer; it must be the only one,
    # and the file must have all layers
    states: tuple[int, ...] = (-1,)
    stacked_states: tuple[
        int, ...
    ] = ()  # hidden states that are stacked, L n C, instead of concatenating `states`
    final_norm: bool = False  # whether the final norm is applied to the last state even if it is not -1
    pre_norm: bool = False  # whether state -1 is the one before the final norm
    keeps_template_suffix: bool = False  # whether `template_suffix` is kept if a prompt is too long
    # padding token: prompts are padded to `max_length` tokens, and padding has states; None: no padding
    pad_token: str | None = None
    # If `pad_token` is set, each prompt is padded to a multiple of this number of tokens instead. Padding has
    # position 1, as in the version of transformers that models were trained with
    pad_to_multiple_of: int = 0
    # without `pad_token`: positions are those after padding on the left to `max_length`
    pads_left: bool = False
    mask_key: str = ""  # key of the mask, 1 for real tokens; "": no mask is returned
    batch_size: int = 8  # number of prompts in a batch; limits memory
    image_format: ImagePromptFormat | None = None  # how images are put into a prompt; None: no images
    # Keys of the positions and sizes of images. If `image_positions_key` is set, the states of image tokens
    # are removed, and an image's position is the number of remaining states before it. Sizes are rows and
    # columns of patches, of which a token has 2 x 2. "": states of image tokens are not removed
    image_positions_key: str = ""
    image_sizes_key: str = ""
    # key of the hashes of a dataset item's images (`ImagePromptFormat.hash_images`); "": no hashes
    image_hashes_key: str = ""
    record_prefix: str = ""  # prefix of the encoder's keys in cache records; "": `name`

    @property
    def state_indices(self) -> tuple[int, ...]:
        """Indices of the hidden states that the encoder returns, stacked or concatenated."""
        return self.stacked_states or self.states

    @property
    def keys(self) -> frozenset[str]:
        """Names of the conditions that the encoder returns."""
        return frozenset(
            {self.states_key, self.mask_key, self.image_positions_key, self.image_sizes_key} - {""}
        )

    @property
    def template(self) -> str:
        """The prompt template; `{}` stands for the prompt."""
        images = self.image_format.text if self.image_format else ""
        return f"{self.template_prefix}{images}{{}}{self.template_suffix}"

    @property
    def template_key(self) -> str:
        """Key of the template's hash in cache records (`LanguageModelEncoder.identity`)."""
        return f"{self.record_prefix or self.name}_template"

    @property
    def fingerprint(self) -> str:
        """Hash of the template, for cache records."""
        return hashlib.sha256(self.template.encode()).hexdigest()[:16]

    def find_other_template(self, batch: Batch) -> Path | None:
        """Return the first cache of a batch whose text was encoded with another template; None if all fit.

        Caches that record no template are taken as fitting.
        """
        for cache in batch.cache_origins:
            fingerprint = cache.encoder.get(self.template_key, self.fingerprint)
            if cache.part == self.name and fingerprint != self.fingerprint:
                return cache.path
        return None


class LanguageModelEncoder(FileTextEncoder[nn.Module]):
    """Text encoder that returns a language model's hidden states for each token of a prompt."""

    abilities = EncoderAbilities(
        offloads_layers=True, shardable=True, has_vision_tower=True, accepts_new_words=True
    )
    logs_truncation = True
    blocks: BlockSharder | None = None  # splits the network over processes

    def __init__(
        self,
        settings: LanguageEncoderSettings,
        path: Path,
        dtype: torch.dtype = torch.bfloat16,
        tokenizer: Path | None = None,
        form: str | None = None,
        on_cpu: bool = False,
    ) -> None:
        """Set up the encoder; files are read by `load`.

        Args:
            settings: How the family uses the model.
            path: File or folder of the model, or of a release with the model in its subfolder `text_encoder`.
            dtype: Compute dtype.
            tokenizer: Value of the tokenizer's option; None searches near the model.
            form: Module of `checkpoints.stored` that quantizes the weights; None keeps the file's form.
            on_cpu: Whether to compute on the CPU regardless of the run's device.
        """
        super().__init__(inside(path, "text_encoder"), tokenizer, form)
        self.settings = settings
        self.dtype = dtype
        self.on_cpu = on_cpu
        self.name = settings.name
        self.source = settings.source
        self.max_length = settings.max_length
        self.keys = settings.keys
        self.word_keys = (settings.model.word_key,)
        pads_to_maximum = settings.pad_token is not None and not settings.pad_to_multiple_of
        self.variable_length: frozenset[str] = frozenset()  # conditions whose length differs between prompts
        if not pads_to_maximum:
            self.variable_length = settings.keys | {settings.image_hashes_key}
        # key of the states that prompt weights, such as (cat:1.2), multiply
        self.weighted_states_key = settings.states_key
        self.pads_left = settings.pads_left

    @property
    def state(self) -> str | None:
        """Description of the hidden states in use, for cache records."""
        numbers = ", ".join(map(str, self.settings.state_indices)) or "all"
        if self.settings.pre_norm:
            return f"{numbers}, {PRE_NORM}"
        return f"{numbers}, normed" if self.settings.final_norm else numbers

    @property
    def _config(self) -> LanguageConfig:
        with open_checkpoint(self.path) as checkpoint:
            return read_language_model(checkpoint, self.settings.model, self.settings.state_indices).config

    @property
    def token_bytes(self) -> int:
        """Size in bytes of one token's hidden states."""
        return self._config.dim * len(self.settings.state_indices) * self.dtype.itemsize

    @property
    def identity(self) -> Mapping[str, str]:
        """Fields of cache records: everything that states depend on except the text, e.g. dtype."""
        config = self._config
        return self.identify(
            self.settings.record_prefix or self.name,
            config=f"{config.num_heads} heads, theta {config.theta}, eps {config.eps}{config.settings_text}",
            dtype=dtype_name(self.dtype),
            state=self.state,
            template=self.settings.fingerprint,
            weights=self.form,
            # major versions of transformers differ in which state they return as the last
            transformers=version("transformers").partition(".")[0] if self.settings.pre_norm else None,
        )

    def apply_template(self, prompt: Prompt) -> TemplatedPrompt:
        """Insert a prompt into the template, and shift the spans of its weights accordingly."""
        settings = self.settings
        text = prompt.text
        num_stripped = 0  # characters of white space removed before the prompt
        if settings.strips_prompt:
            num_stripped = len(text) - len(text.lstrip())
            text = text.strip()
        text = text or settings.empty_prompt_text  # what the family writes for an empty prompt
        weighted_spans = []
        for first_character, last_character, weight in prompt.weighted_spans:
            weighted_spans.append((first_character - num_stripped, last_character - num_stripped, weight))
        start = len(settings.template_prefix)
        return TemplatedPrompt(
            text=f"{settings.template_prefix}{text}{settings.template_suffix}",
            prompt=text,
            spans=tuple(weighted_spans),
            start=start,
            # tokens from here on are kept if the prompt is too long
            suffix_start=start + len(text) if settings.keeps_template_suffix else math.inf,
        )

    def count_template_tokens(self, tokenizer: TextTokenizer) -> int:
        """Return the number of template tokens before the prompt, whose states are dropped."""
        if self.settings.num_dropped_tokens is not None:
            return self.settings.num_dropped_tokens
        return len(tokenizer.read(self.settings.system or self.settings.template_prefix).ids)

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Warn unless the template before the prompt has `settings.num_dropped_tokens` tokens."""
        counted = len(tokenizer.read(self.settings.template_prefix).ids)
        expected = self.settings.num_dropped_tokens
        if expected and counted != expected:
            logger.warning(
                "the tokenizer splits the template before the prompt into %d tokens, but the model's own "
                "into %d: prompts will be cut in the wrong place. Pass the tokenizer of this model to %s.",
                counted,
                expected,
                self.source.files.option,
            )

    def load(self, device: torch.device) -> None:
        """Load the model onto `device`, or onto the CPU if `on_cpu` is set."""
        super().load(CPU if self.on_cpu else device)

    def load_network(self, device: torch.device) -> nn.Module:
        """Load the language model, with its vision tower if the family always uses images.

        If a CUDA device has too little free memory, some of the layers stay in host memory.
        """
        settings = self.settings
        # splitting over processes saves device memory, which a network on the CPU does not use
        blocks = None if self.on_cpu else self.blocks
        vision_tower = None
        if settings.image_format is not None and settings.image_format.loads_tower_at_once:
            vision_tower = load_vision_tower(self.path, settings.model, device, self.dtype)
        free_bytes = None  # free bytes on the device; None: load all layers there
        # backward passes need all layers on the device
        if device.type == "cuda" and blocks is None and not self.learns_word:
            free_bytes = spare_bytes(device)
        network = load_language_model(
            self.path,
            settings.model,
            device=device,
            dtype=self.dtype,
            states=settings.state_indices,
            final_norm=settings.final_norm,
            form=self.form,
            free_bytes=free_bytes,
            blocks=blocks,
            pre_norm=settings.pre_norm,
        )
        if vision_tower is not None:
            network.visual = vision_tower
        logger.info("%s: %s, computing in %s", self.description, self.path, dtype_name(self.dtype))
        return network

    def offloaded_bytes(self, free_bytes: int) -> int:
        """Return the size of the layers that stay in host memory if the device has `free_bytes` left."""
        if self.on_cpu:
            return 0
        with open_checkpoint(self.path) as checkpoint:
            settings = self.settings
            plan = read_language_model(
                checkpoint, settings.model, settings.state_indices, settings.final_norm, settings.pre_norm
            )
            num_streamed, layer_bytes = plan_streamed_layers(plan, self.dtype, self.form, free_bytes)
        return num_streamed * layer_bytes

    def find_token(self, tokenizer: TextTokenizer, token: str) -> int:
        """Return the id of a token.

        Raises:
            CheckpointError: If the tokenizer does not have the token.
        """
        number = tokenizer.token_to_id(token)
        if number is None:
            raise self.source.files.unreadable(tokenizer.file, ValueError(f"it has no {token}"))
        return number

    def find_pad(self, tokenizer: TextTokenizer) -> int:
        """Return the id of the padding token; 0 for a model without one."""
        return self.find_token(tokenizer, self.settings.pad_token) if self.settings.pad_token else 0

    def compute(
        self,
        network: nn.Module,
        tokenizer: TextTokenizer,
        token_ids: Sequence[list[int]],
        num_template_tokens: int,
        images: Sequence[PatchedImages] = (),
    ) -> list[Conditions]:
        """Return the conditions of each prompt: its hidden states, and the mask of its tokens.

        Args:
            network: The language model.
            tokenizer: Its tokenizer.
            token_ids: Token ids of each prompt with its template.
            num_template_tokens: Number of template tokens before each prompt; their states are dropped.
            images: Images of each prompt.

        Returns:
            For each prompt, its states by key: T nC, with n layers concatenated, if all prompts are padded to
            `max_length` tokens. Otherwise a list of one tensor, L nC, where L counts the tokens of the prompt
            and of the template after it. Stacked states have n C instead of nC.
        """
        pad = self.find_pad(tokenizer)
        vocabulary = len(network.get_parameter(self.embedding))
        # ids of prompts have been checked; the padding id of another model's tokenizer may be too large
        check_ids([[pad]], vocabulary, self.path, self.source.files.option)
        results: list[Conditions] = []
        batch_size = self.settings.batch_size
        for first in range(0, len(token_ids), batch_size):
            batch = token_ids[first : first + batch_size]
            batch_images = images[first : first + batch_size]
            results += self._compute_batch(network, tokenizer, batch, batch_images, pad, num_template_tokens)
        return results

    def _compute_batch(
        self,
        network: nn.Module,
        tokenizer: TextTokenizer,
        batch: Sequence[list[int]],
        images: Sequence[PatchedImages],
        pad: int,
        num_template_tokens: int,
    ) -> list[Conditions]:
        """Return the conditions of a batch of prompts, without the batch's padding."""
        # `pad` is the id of the padding token; the other arguments are those of `compute`.
        padded_length = self._select_length(batch, num_template_tokens)
        padded_ids, mask = fill_rows(batch, padded_length, pad, self.settings.pads_left)
        # N hidden states of padded token ids, B L: concatenated, B L nC, or stacked, B L n C
        inputs = self._embed(network, tokenizer, padded_ids, images, mask=mask)
        states = language_states(
            network,
            inputs.embeddings,
            mask=mask.to(inputs.embeddings.device),
            states=self.settings.state_indices,
            position_ids=inputs.position_ids,
            layer_additions=inputs.layer_additions,
        )
        if self.settings.stacked_states:
            states = states.unflatten(-1, (len(self.settings.stacked_states), -1))
        states = states[:, num_template_tokens:].cpu()
        mask = mask[:, num_template_tokens:]
        results: list[Conditions] = []
        for index, ids in enumerate(batch):
            length = self._length_alone(ids, num_template_tokens) - num_template_tokens
            conditions = self._make_conditions(states[index], mask[index], length)
            if self.settings.image_positions_key:
                grids = images[index].token_grids if images else ()
                prompt_ids = ids[num_template_tokens:]
                conditions |= self._split_images(tokenizer, states[index], prompt_ids, grids)
            results.append(conditions)
        return results

    def _length_alone(self, ids: list[int], num_template_tokens: int) -> int:
        """Return the prompt's length in tokens if it were encoded alone, including the template's tokens."""
        if self.settings.pad_to_multiple_of:
            return self._select_length([ids], num_template_tokens)
        return len(ids)

    def _split_images(
        self,
        tokenizer: TextTokenizer,
        states: Tensor,
        ids: Sequence[int],
        token_grids: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor | list[Tensor]]:
        """Return the states of the text tokens, and the positions and sizes of the images, by key."""
        # states: Hidden states of a prompt, L C, possibly followed by padding states.
        settings = self.settings
        assert settings.image_format is not None
        placeholder = self.find_token(tokenizer, settings.image_format.token) if token_grids else None
        # indices instead of a mask: memory planning runs with fake tensors, which cannot be indexed by masks
        text_indices = [index for index, token_id in enumerate(ids) if token_id != placeholder]
        image_positions = []  # number of text tokens in front of each image
        num_text_tokens = 0
        token_index = 0
        for rows, columns in token_grids:
            while ids[token_index] != placeholder:
                token_index += 1
                num_text_tokens += 1
            image_positions.append(num_text_tokens)
            token_index += rows * columns
        separated: dict[str, Tensor | list[Tensor]] = {
            settings.states_key: [states.index_select(0, torch.tensor(text_indices))],
            settings.image_positions_key: [torch.tensor(image_positions, dtype=torch.int64)],
        }
        if settings.image_sizes_key:
            patch_grids = [(2 * rows, 2 * columns) for rows, columns in token_grids]  # 2 x 2 patches a token
            separated[settings.image_sizes_key] = [torch.tensor(patch_grids, dtype=torch.int64).view(-1, 2)]
        return separated

    def _select_length(self, token_ids: Sequence[list[int]], num_template_tokens: int) -> int:
        """Return the token count, including the template's tokens, to which a batch's prompts are padded."""
        settings = self.settings
        longest = max(map(len, token_ids))
        max_length = num_template_tokens + settings.max_length
        if settings.pad_token is None:
            return longest
        if settings.pad_to_multiple_of:
            rounded_up = math.ceil(longest / settings.pad_to_multiple_of) * settings.pad_to_multiple_of
            return min(rounded_up, max_length)
        return max_length

    def _embed(
        self,
        network: nn.Module,
        tokenizer: TextTokenizer,
        ids: Tensor,
        images: Sequence[PatchedImages],
        mask: Tensor,
    ) -> PromptEmbeddings:
        """Return the embeddings of tokens, with image features in place of placeholder tokens."""
        # `ids` and `mask`, each B L, are on the CPU; the mask is 1 for real tokens.
        settings = self.settings
        embedding = network.get_submodule(self.embedding.removesuffix(".weight"))
        device = network.get_parameter(self.embedding).device
        token_embeddings = embedding(ids.to(device))
        if any(prompt.token_grids for prompt in images):
            assert settings.image_format is not None
            placeholder = self.find_token(tokenizer, settings.image_format.token)
            vision_tower = network.get_submodule("visual")
            return embed_images(
                vision_tower, token_embeddings, ids=ids, images=images, placeholder=placeholder
            )
        return PromptEmbeddings(token_embeddings, self._make_position_ids(mask), layer_additions=[])

    def _make_position_ids(self, mask: Tensor) -> Tensor | None:
        """Return position ids for a padding mask, B L; None for the default 0, 1, 2, ..."""
        settings = self.settings
        length = mask.shape[1]
        if settings.pad_to_multiple_of:  # all padding has position 1
            return torch.arange(length).masked_fill(mask == 0, 1)
        if settings.pad_token is None and settings.pads_left:
            # the prompt is not padded, but has positions as if padding before it filled `max_length` tokens
            return torch.arange(settings.max_length - length, settings.max_length)[None]
        return None

    def _make_conditions(self, states: Tensor, mask: Tensor, length: int) -> dict[str, Tensor | list[Tensor]]:
        """Return a prompt's states and mask, by condition key."""
        # If prompts are padded to `max_length`, the tensors contain all tokens. Otherwise they contain the
        # first `length` tokens (including the padding of `pad_to_multiple_of`), each tensor in a list.
        settings = self.settings
        if settings.pad_token is not None and not settings.pad_to_multiple_of:
            return {settings.states_key: states.clone(), **self._mask(mask)}
        conditions = {settings.states_key: states[:length].clone(), **self._mask(mask[:length])}
        return {key: [tensor] for key, tensor in conditions.items()}

    def _mask(self, real: Tensor) -> dict[str, Tensor]:
        return {self.settings.mask_key: real.clone()} if self.settings.mask_key else {}

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return the conditions of each prompt and its images, on the CPU.

        Image tokens do not count towards `max_length`.

        Raises:
            MediaError: If an image cannot be used.
            CheckpointError: If the tokenizer has no placeholder token for images.
        """
        encoded = self._encode_prompts(prompts)
        image_hashes_key = self.settings.image_hashes_key
        image_format = self.settings.image_format
        if not image_hashes_key or image_format is None or image_format.hash_images is None:
            return encoded
        # hashes let a family check that the text encoder and the transformer saw the same images
        with_hashes = []
        for prompt, conditions in zip(prompts, encoded, strict=True):
            if len(prompt.image_pixels) == len(prompt.images):  # only prompts from a dataset have frames
                hashes = image_format.hash_images(image_format.select(prompt.image_pixels))
                conditions = {**conditions, image_hashes_key: [hashes]}
            with_hashes.append(conditions)
        return with_hashes

    def load_tower(self, device: torch.device) -> None:
        """Load the vision tower onto a device, unless it is loaded or the family uses no images.

        Raises:
            CheckpointError: If the file has no vision tower, or the tower of a different model.
        """
        network, _ = self._loaded.get()
        if self.settings.image_format is not None and not hasattr(network, "visual"):
            network.visual = load_vision_tower(self.path, self.settings.model, device, self.dtype)

    def _encode_prompts(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Encode prompts with the images that the model sees with them."""
        image_format = self.settings.image_format
        if image_format is None:
            return super().encode(prompts)
        frames = [self.read_frames(prompt) for prompt in prompts]
        if not any(frames):
            return super().encode(prompts)
        network, tokenizer = self._loaded.get()
        self.load_tower(network.get_parameter(self.embedding).device)
        tower = network.get_submodule("visual")
        images = [read_images(tower, pictures, image_format) for pictures in frames]
        placeholder = self.find_token(tokenizer, image_format.token)
        templated_prompts: list[TemplatedPrompt] = []
        for prompt, prompt_images in zip(prompts, images, strict=True):
            templated = self.apply_template(prompt)
            # a typed placeholder would be mistaken for an image
            if prompt_images.token_grids and placeholder in tokenizer.read(templated.prompt).ids:
                raise MediaError(
                    f"{image_format.token} stands for an image. Remove it from the prompt: {templated.prompt}"
                )
            placed = self.place_images(prompt, templated, prompt_images.counts)
            templated_prompts.append(placed._replace(num_image_tokens=sum(prompt_images.counts)))
        return self.encode_templated(templated_prompts, functools.partial(self.compute, images=images))

    def read_frames(self, prompt: Prompt) -> list[Tensor]:
        """Return the images that the model sees with a prompt, H W 3 uint8 each, in their order.

        Raises:
            MediaError: If an image cannot be read.
        """
        image_format = self.settings.image_format
        assert image_format is not None
        if prompt.image_pixels:  # already decoded
            return [image_format.show(frame) for frame in image_format.select(prompt.image_pixels)]
        paths = image_format.select(prompt.images)
        return [image_format.read(path, prompt.image_size) for path in paths]

    def place_images(
        self, prompt: Prompt, templated: TemplatedPrompt, counts: Sequence[int]
    ) -> TemplatedPrompt:
        """Return a templated prompt with the placeholder tokens of its images in front of its text.

        Args:
            prompt: The prompt.
            templated: The same in the template.
            counts: Number of tokens of each image.
        """
        assert self.settings.image_format is not None
        inserted = ""
        for number, num_tokens in enumerate(counts, start=1):
            inserted += self.settings.image_format.write(number, num_tokens, len(counts))
        return templated._replace(
            text=templated.text[: templated.start] + inserted + templated.text[templated.start :],
            start=templated.start + len(inserted),
            suffix_start=templated.suffix_start + len(inserted),
        )


@dataclass(frozen=True)
class LanguageModelFiles(TransformerFiles):
    """Model files of a family whose only text encoder is a language model."""

    encoder_class: ClassVar[type[LanguageModelEncoder]] = LanguageModelEncoder
    text_encoder: Path | None = None
    text_encoder_tokenizer: Path | None = None
    text_form: str | None = None
    text_on_cpu: bool = False

    @property
    @abstractmethod
    def encoder_settings(self) -> LanguageEncoderSettings:
        """Return the family's prompt template and hidden states for its language model."""

    def add_text(self, options: TextEncoderOptions) -> Self:
        """Return a copy with the settings of the text encoder options: file, tokenizer, dtype and device."""
        return replace(
            self,
            text_encoder=options.text_encoder,
            text_encoder_tokenizer=options.text_encoder_tokenizer,
            text_dtype=select_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            text_form=text_form(options),
            text_on_cpu=options.text_encoder_cpu,
        )

    @property
    def text_encoder_path(self) -> Path:
        """Path of the language model; raises an error if it is missing."""
        model = self.encoder_settings.model
        return require_file(self.text_encoder, model.option, f"{model.description} encodes the prompts")

    def language_model(self) -> LanguageModelEncoder:
        """Return the language model's encoder without opening its file, which `load` does."""
        return self.encoder_class(
            self.encoder_settings,
            self.text_encoder_path,
            dtype=self.encoder_dtype(self.text_dtype),
            tokenizer=self.text_encoder_tokenizer,
            form=self.text_form,
            on_cpu=self.text_on_cpu,
        )

    def text_encoders(self) -> list[TextEncoder]:
        """Return the language model as the only text encoder."""
        return [self.language_model()]

    def text_width(self) -> int:
        """Return the width of a token's states: concatenated, or of one state if they are stacked."""
        return read_once(self.language_model().path, _measure_states, self.encoder_settings)

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check the language model's files, and that its hidden states match the transformer's text width.

        Args:
            config: Dimensions of the transformer; None if its option is not set.
            needed: Whether the option of the language model must be set.
        """
        settings = self.encoder_settings
        model = settings.model
        if self.text_encoder is not None or needed:
            check_state_width(
                model.option,
                self.language_model().path,
                width=self.text_width(),
                dit_path=self.dit,
                dit_width=None if config is None else config.text_dim,
                fits=model.files,
            )
            if settings.image_format is not None and settings.image_format.loads_tower_at_once:
                self.check_tower()
        if self.text_encoder_tokenizer is not None:
            settings.source.files.check_option_value(self.text_encoder_tokenizer)

    def check_tower(self) -> None:
        """Raise CheckpointError unless the language model's file has a vision tower of the right model."""
        read_once(self.language_model().path, _read_tower, self.encoder_settings)


def _measure_states(checkpoint: Checkpoint, settings: LanguageEncoderSettings) -> int:
    config = read_language_model(checkpoint, settings.model, settings.state_indices).config
    if settings.stacked_states:
        return config.dim
    states = settings.states or all_states(config.num_layers)
    return len(states) * config.dim


# takes a `LanguageEncoderSettings`, because `read_once` caches by the arguments and a `LanguageModel`
# cannot be hashed
def _read_tower(checkpoint: Checkpoint, settings: LanguageEncoderSettings) -> Any:
    return read_vision_tower(checkpoint, settings.model)
