"""LTX-2's text encoder, as the shared loops use it: the states of all layers of Gemma, and the connectors.

Names of the outputs are those of other trainers' caches, with the connectors already run. Source: the
released model code; for Gemma 3 Gemma Team 2025, arXiv 2503.19786, and the config.json of
google/gemma-3-12b-it.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from checkpoints.dialects import load_planned
from checkpoints.encoders import check_state_width
from checkpoints.filling import on_meta_device
from checkpoints.model_files import inside
from checkpoints.opening import fingerprint, open_checkpoint
from checkpoints.tokenizers import TokenizerFiles
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelEncoder
from encoders.language_models import (
    ALL_STATES,
    FEED_NORM,
    FULL_ATTENTION,
    Q_NORM,
    SLIDING_ATTENTION,
    LanguageModel,
    all_states,
    read_language_model,
)
from encoders.picture_prompts import PatchedImages
from encoders.text_encoder import TemplatedPrompt, TextTokenizer, TokenizerSource
from ltx_2.connectors import (
    FILES,
    OPTION,
    ConnectorsConfig,
    TextConnectors,
    open_connectors,
    read_connectors,
)
from ltx_2.model_options import STREAMS
from modules.errors import CheckpointError
from protocols.data import Conditions, weigh_tokens
from protocols.family import EncoderAbilities
from protocols.requests import Prompt

# settings of the 12B model, for a file without config.json
STRETCH = 8.0  # positions of FULL_ATTENTION layers are divided by it
WINDOW = 1024  # tokens that SLIDING_ATTENTION layers look back
PATTERN = 6  # every sixth layer is FULL_ATTENTION
THETA, NEAR_THETA = 1e6, 1e4  # bases of the rotary frequencies


def read_settings(
    settings: Mapping[str, Any], num_layers: int, head_width: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Translate the settings of Gemma 3 to keyword arguments of transformers' Gemma3TextConfig.

    Reads the keys of transformers 4 and 5. Raises ValueError or TypeError for invalid values.
    """
    kind, stretch, theta, sliding_theta = _read_rotary_settings(settings)
    scalar = int(settings.get("query_pre_attn_scalar", head_width))
    window = int(settings.get("sliding_window", WINDOW))
    pattern = settings.get("_sliding_window_pattern", PATTERN)
    pattern = int(settings.get("sliding_window_pattern", pattern))  # also under its older name
    numbers = (stretch, theta, sliding_theta, scalar, window, pattern)
    are_positive = all(0 < number < math.inf for number in numbers)
    if kind not in ("default", "linear") or not are_positive:
        listed = ", ".join(map(str, numbers))
        raise ValueError(f"rotary frequencies of type {kind}, values {listed}")
    return {
        "rope_theta": theta,
        "rope_local_base_freq": sliding_theta,
        "rope_scaling": None if stretch == 1 else {"rope_type": "linear", "factor": stretch},
        "query_pre_attn_scalar": scalar,
        "sliding_window": window,
        "layer_types": _list_layer_types(settings, num_layers, pattern),
    }


class _RotarySettings(NamedTuple):
    """Rotary embeddings of Gemma 3: of layers that attend to all tokens, and of those with a window."""

    kind: str  # how positions are scaled: default or linear
    stretch: float  # positions of FULL_ATTENTION layers are divided by it
    theta: float
    sliding_theta: float  # of SLIDING_ATTENTION layers


def _read_rotary_settings(settings: Mapping[str, Any]) -> _RotarySettings:
    """Read the rotary settings, with the released values for those left out."""
    # transformers 5 groups them by attention kind in rope_parameters; 4 has a separate name for each.
    rope = settings.get("rope_parameters") or {}
    full = rope.get(FULL_ATTENTION) or {}
    sliding = rope.get(SLIDING_ATTENTION) or {}
    scaling = full if rope else settings.get("rope_scaling") or {}
    theta = full.get("rope_theta", settings.get("rope_theta", THETA))
    sliding_theta = sliding.get("rope_theta", settings.get("rope_local_base_freq", NEAR_THETA))
    return _RotarySettings(
        kind=scaling.get("rope_type", scaling.get("type", "default")),
        # a config.json without a factor means 1; without config.json, the released model is assumed
        stretch=float(scaling.get("factor", 1.0)) if settings else STRETCH,
        theta=float(theta),
        sliding_theta=float(sliding_theta),
    )


def _list_layer_types(settings: Mapping[str, Any], num_layers: int, pattern: int) -> list[str]:
    """Return each layer's attention kind; by default, every `pattern`-th layer is FULL_ATTENTION."""
    layers = settings.get("layer_types")
    if not layers:
        layers = [
            FULL_ATTENTION if number % pattern == 0 else SLIDING_ATTENTION
            for number in range(1, num_layers + 1)
        ]
    layers = [str(layer) for layer in layers][:num_layers]
    if len(layers) < num_layers or not {FULL_ATTENTION, SLIDING_ATTENTION} >= set(layers):
        raise ValueError(f"layer_types {layers} of {num_layers} layers")
    return layers


GEMMA_3 = LanguageModel(
    description="a Gemma 3 language model",
    option="--gemma_root",
    files=(
        "the folder of google/gemma-3-12b-it-qat-q4_0-unquantized, or one file of the model to "
        "--gemma_safetensors and its folder"
    ),
    class_prefix="Gemma3Text",
    kind="gemma3",
    word_key="gemma3_12b",
    # defaults that transformers does not write
    defaults={
        "hidden_size": 2304,
        "num_attention_heads": 8,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    theta=THETA,
    eps=1e-6,
    distinguishing_tensors=(Q_NORM, FEED_NORM),
    rope_types=("default", "linear"),
    read_settings=read_settings,
)


ROWS = 1024  # length of every text: registers fill up the rest, and the transformer attends to all rows
MASK = "prompt_attention_mask"
STATES = "states"
TOKENIZER_FILES = TokenizerFiles(
    option="--gemma_root",
    names=("tokenizer.json", "tokenizer.model"),
    folder="tokenizer",
    repository="Lightricks/LTX-2",
    # google's folder; diffusers' text_encoder, with tokenizer next to it; next to a single file
    folders=(".", "tokenizer", "../tokenizer"),
    unique_token="<start_of_turn>",
)
GEMMA_USE = LanguageEncoderSettings(
    name="gemma3",
    states_key=STATES,
    model=GEMMA_3,
    source=TokenizerSource(TOKENIZER_FILES, begin="<bos>", may_be_inside=True),
    max_length=ROWS,
    states=ALL_STATES,
    # padding is not computed: its states are unused, and it only shifts the positions of other tokens
    pads_left=True,
    batch_size=1,
)


def prompt_key(stream: str) -> str:
    """Return the cache key of a stream's text states."""
    return f"{stream}_prompt_embeds"


class Ltx2TextEncoder(LanguageModelEncoder):
    """Gemma with the connectors, which return 1024 states per prompt and stream."""

    abilities = EncoderAbilities(
        offloads_layers=True, shardable=True, has_text_layers=True, accepts_new_words=True
    )

    def __init__(
        self,
        path: Path,
        connectors: Path,
        dtype: torch.dtype = torch.bfloat16,
        tokenizer: Path | None = None,
        form: str | None = None,
        on_cpu: bool = False,
        streams: Collection[str] = STREAMS,
        use: LanguageEncoderSettings = GEMMA_USE,
    ) -> None:
        """Set up the encoder; `load` reads the files.

        Args:
            path: File or folder of Gemma.
            connectors: File of the connectors, or a release's folder.
            dtype: Compute dtype of Gemma, and dtype of the connectors' weights.
            tokenizer: Folder or file of the tokenizer.
            form: Storage format of Gemma's weights in memory, such as a quantized one; None keeps the file's.
            on_cpu: Run on the CPU.
            streams: Streams (video, audio) whose text states the connectors compute.
            use: Settings of the Gemma version.
        """
        super().__init__(use, path, dtype, tokenizer, form=form, on_cpu=on_cpu)
        self.connectors = inside(connectors, "connectors")
        self.streams = tuple(streams)
        self.keys = frozenset({*map(prompt_key, self.streams), MASK})
        self.variable_length = frozenset()
        self.weighted_states_key = prompt_key(self.streams[0])
        self.pads_left = False  # the connectors' output begins with the prompt's tokens

    @property
    def identity(self) -> Mapping[str, str]:
        """Return what the text states depend on besides the text; reads no weights."""
        return {**super().identity, "connectors": fingerprint(self.connectors)}

    def check(self) -> None:
        """Check that the connectors fit Gemma, whose states of all layers they read side by side.

        Raises CheckpointError if a file is of another kind, or the connectors require another width.
        """
        model = self.settings.model
        with open_checkpoint(self.path) as checkpoint:
            gemma = read_language_model(checkpoint, model, ALL_STATES).config
        config = self._read_connectors_config()
        width = gemma.dim * len(all_states(gemma.num_layers))
        check_state_width(model.option, self.path, width, self.connectors, config.text_dim, model.files)
        # learned registers are repeated to fill a text up to ROWS states
        if any(ROWS % connector.num_registers for connector in config.streams.values()):
            raise CheckpointError(
                f"{self.connectors}: the number of registers of its connectors does not divide {ROWS}. "
                f"Pass {FILES} to {OPTION}.",
                self.connectors,
            )

    def _read_connectors_config(self) -> ConnectorsConfig:
        with open_connectors(self.connectors, self.path) as checkpoint:
            return read_connectors(checkpoint, self.streams).config

    def _count_connector_bytes(self) -> int:
        """Return how many bytes the loaded connectors take."""
        with on_meta_device():
            connectors = TextConnectors(self._read_connectors_config())
        num_weights = sum(weight.numel() for weight in connectors.parameters())
        return num_weights * self.dtype.itemsize

    def apply_template(self, prompt: Prompt) -> TemplatedPrompt:
        """Strip white space from a prompt, and shift its weighted spans to match."""
        text = prompt.text.strip()
        cut = len(prompt.text) - len(prompt.text.lstrip())
        spans = tuple((first - cut, last - cut, weight) for first, last, weight in prompt.weighted_spans)
        return TemplatedPrompt(text, text, spans)

    def load_network(self, device: torch.device) -> nn.Module:
        """Load the connectors, then Gemma into the remaining memory."""
        self.check()
        # load the connectors first, because Gemma's placement depends on the memory that is left
        with open_connectors(self.connectors, self.path) as checkpoint:
            plan = read_connectors(checkpoint, self.streams)
            what = f"LTX-2's text connectors ({OPTION})"
            connectors = load_planned(plan, TextConnectors, device, self.dtype, label=what)
        network: Any = super().load_network(device)
        network.connectors = connectors
        return network

    @property
    def text_layers(self) -> nn.Module:
        """Return the connectors."""
        return self.network.get_submodule("connectors")

    def offloaded_bytes(self, free_bytes: int) -> int:
        """Return how many bytes of Gemma stay in host memory so that the connectors fit as well."""
        self.check()
        return super().offloaded_bytes(max(free_bytes - self._count_connector_bytes(), 0))

    def compute(
        self,
        network: nn.Module,
        tokenizer: TextTokenizer,
        token_ids: Sequence[list[int]],
        num_template_tokens: int,
        images: Sequence[PatchedImages] = (),
    ) -> list[Conditions]:
        """Return each stream's connector output, 1024 states, for each prompt, and a mask of ones.

        Other trainers cache such a mask too, although all 1024 states are used.
        """
        connectors: Any = network.connectors
        device = next(connectors.parameters()).device
        width = network.get_parameter(self.embedding).shape[1]
        all_conditions: list[Conditions] = []
        for ids in token_ids:  # singly, as the states of all layers are large
            (gemma_conditions,) = super().compute(network, tokenizer, [ids], num_template_tokens)
            (states,) = gemma_conditions[STATES]
            texts = connectors(states.to(device).unflatten(-1, (-1, width)), ROWS)  # T layers width
            conditions = {prompt_key(stream): text.cpu() for stream, text in texts.items()}
            conditions[MASK] = torch.ones(ROWS, dtype=torch.int64)
            all_conditions.append(conditions)
        return all_conditions

    def weigh(self, conditions: Conditions, weights: Sequence[float]) -> Conditions:
        """Return the conditions with each text row scaled by its weight."""
        texts = {prompt_key(stream) for stream in self.streams}
        return {
            name: weigh_tokens(rows, weights) if name in texts else rows for name, rows in conditions.items()
        }
