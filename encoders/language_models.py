"""Load language models as text encoders: files in every layout, networks from the library transformers.

Only the layers up to the last hidden state that is used are built and loaded, without the language model
head. Files have different prefixes, and some also have a vision tower; the prefix is found from the name of
the token embeddings. Dimensions come from the tensors. Other settings come from a config.json next to the
file, else from the released models below.
"""
# Letters: B prompts, L tokens, C width of the model, D width of a head

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from checkpoints.dialects import (
    LoadPlan,
    count,
    load_planned,
    loaded_bytes,
    make_shape_reader,
    make_wrong_kind_error,
)
from checkpoints.encoders import SPIECE_MODEL, find_network, head_width, read_network_config
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from encoders.vision_towers import POSITIONS, QWEN3_TOWER, QWEN25_TOWER, QWEN35_TOWER, VisionTower
from modules.devices import send_ahead
from modules.errors import CheckpointError, OptionError
from protocols.family import DitSpec
from protocols.loading import BlockSharder
from runtime.offload.block_swap import swap_blocks
from runtime.offload.swap_plan import SwapPlan, host_weights

logger = logging.getLogger(__name__)

SPEC = DitSpec(block_lists=("layers",))
WORKING = 3 << 29  # bytes needed in addition to the weights, for prompts of normal length
Q_PROJ = "self_attn.q_proj.weight"
# tensors of a layer that distinguish the models
Q_BIAS = "self_attn.q_proj.bias"  # Qwen2.5
Q_NORM = "self_attn.q_norm.weight"  # Qwen3 and Gemma
FEED_NORM = "pre_feedforward_layernorm.weight"  # Gemma
SCALAR = "layer_scalar"  # Gemma 4
LINEAR = "linear_attn.A_log"  # Qwen3.5, most of whose layers are Gated DeltaNets
_DISTINGUISHING_TENSORS = (Q_BIAS, Q_NORM, FEED_NORM, SCALAR, LINEAR)
# position embeddings of the vision tower; only they distinguish Qwen3-VL from Qwen3
TOWER_POSITIONS = f"visual.{POSITIONS}"
# beginnings of names in other parts of the same model
_PARTS = (
    "lm_head.", "mtp.", "visual.", "vision_tower.", "vision_model.", "multi_modal_projector.",
    "image_newline", "audio_projector.", "vision_embedder.", "embed_vision.", "embed_audio.",  # Gemma 4's
)  # fmt: skip
ALL_STATES: tuple[int, ...] = ()  # the embeddings and the states after each layer, the last one normalized
# kinds of layers, as transformers calls them
SLIDING_ATTENTION = "sliding_attention"  # local: attention to a window of previous tokens
FULL_ATTENTION = "full_attention"  # global: attention to all previous tokens
LINEAR_ATTENTION = "linear_attention"
# prefixes of tensors outside the text network: other parts of the model, and files such as a tokenizer that
# are stored as bytes
OTHER_TENSORS = (
    *(f"{prefix}{part}" for prefix in ("", "model.", "language_model.") for part in _PARTS),
    "tokenizer",
    "tekken_model",
    "logit_scale",
    SPIECE_MODEL,
    "hf_asset__",
    "text_embedding_projection.",
)
# buffers saved by old versions of transformers; computed here
_COMPUTED = ("rotary_emb.inv_freq", "layers.*.rotary_emb.inv_freq")


@dataclass(frozen=True)
class LanguageModel:
    """A released language model: how to recognize its files, and settings that its tensors do not show."""

    description: str  # for messages, such as "a Llama language model"
    option: str  # option for its file
    files: str  # names of suitable files, for messages
    class_prefix: str  # classes in transformers, without "Config" and "Model"
    kind: str | tuple[str, ...]  # prefix of `model_type` in a config.json, or several
    word_key: str  # key of its vectors in embedding files, as in ComfyUI
    defaults: Mapping[str, float]  # values of keys that a config.json leaves out
    theta: float  # base of the rotary frequencies if there is no config.json
    eps: float  # epsilon of the norms if there is no config.json
    head_width: int = 128  # if there is no config.json and the tensors do not show it
    # which of `_DISTINGUISHING_TENSORS` its first layer with full attention has, and TOWER_POSITIONS if the
    # files contain it
    distinguishing_tensors: tuple[str, ...] = ()
    # types of rotary embedding that a config.json may ask for, equal for text; the first one if it asks for
    # none
    rope_types: tuple[str, ...] = ("default",)
    # how rotary frequencies are shared among time, rows and columns: sixteenths; (): thirds, with alternating
    # axes; None: the model has text only
    mrope_sixteenths: tuple[int, int, int] | tuple[()] | None = None
    tower: VisionTower | None = None  # encodes images in prompts
    skip_option: str = ""  # option that sets the number of layers after the state that is used
    # additional keys of the transformers config
    settings: Mapping[str, Any] = field(default_factory=dict)
    # returns further keys; takes the values of config.json ({} if there is none), the number of layers to
    # run, the channels of a head, and the shapes of all tensors by name
    read_settings: Callable[
        [Mapping[str, Any], int, int, Mapping[str, tuple[int, ...]]], Mapping[str, Any]
    ] = lambda *_: {}
    config_key: str = ""  # metadata key under which its file may contain a config.json; "": none
    min_transformers: str = ""  # first version of transformers with its classes; "": all supported ones
    first_attention_layer: int = 0  # first layer with attention; its tensors show the number of heads
    partial_rotary_factor: float = 1.0  # fraction of a head's channels with rotary embedding
    query_chunks: int = 1  # 2: the query projection also has gates of the same size
    keep_float32: tuple[str, ...] = ()  # suffixes of tensor names that stay in float32


LLAMA = LanguageModel(
    description="a Llama language model",
    option="--text_encoder1",
    files=(
        "the folder text_encoder of HunyuanVideo, llava-llama-3-8b-v1_1-transformers or "
        "llava_llama3_fp16.safetensors"
    ),
    class_prefix="Llama",
    kind="llama",
    word_key="llama",
    defaults={"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    theta=500000.0,
    eps=1e-5,
    skip_option="--hidden_state_skip_layer",
)
QWEN25_VL = LanguageModel(
    description="the language model of Qwen2.5-VL",
    option="--text_encoder",
    files="qwen_2.5_vl_7b.safetensors of Comfy-Org, or the folder of Qwen/Qwen2.5-VL-7B-Instruct,",
    class_prefix="Qwen2_5_VLText",
    kind="qwen2",
    word_key="qwen25_7b",
    defaults={"hidden_size": 8192, "num_attention_heads": 64, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    theta=1e6,
    eps=1e-6,
    distinguishing_tensors=(Q_BIAS,),
    rope_types=("default", "mrope"),
    mrope_sixteenths=(4, 6, 6),
    tower=QWEN25_TOWER,
    settings={"use_sliding_window": False},
)
QWEN3 = LanguageModel(
    description="a Qwen3 language model",
    option="--text_encoder",
    files="qwen_3_4b.safetensors of Comfy-Org, or the folder of Qwen/Qwen3-4B,",
    class_prefix="Qwen3",
    kind="qwen3",
    word_key="qwen3_4b",
    defaults={"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
    theta=1e6,
    eps=1e-6,
    distinguishing_tensors=(Q_NORM,),
    settings={"use_sliding_window": False},
)
QWEN3_VL = LanguageModel(
    description="the language model of Qwen3-VL",
    option="--text_encoder",
    files="qwen3vl_4b_bf16.safetensors of Comfy-Org, or the folder of Qwen/Qwen3-VL-4B-Instruct,",
    class_prefix="Qwen3VLText",
    kind="qwen3_vl",
    word_key="qwen3vl_4b",
    defaults={"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 5e6, "rms_norm_eps": 1e-6},
    theta=5e6,
    eps=1e-6,
    distinguishing_tensors=(Q_NORM, TOWER_POSITIONS),
    rope_types=("default", "mrope"),
    mrope_sixteenths=(6, 5, 5),
    tower=QWEN3_TOWER,
)


def _read_delta_layers(
    config_json: Mapping[str, Any], num_layers: int, _width: int, shapes: Mapping[str, tuple[int, ...]]
) -> Mapping[str, Any]:
    """Return the Gated DeltaNet settings and the kinds of all layers, under transformers' names."""
    delta = "layers.0.linear_attn."  # layer 0 of Qwen3.5 is a DeltaNet layer
    value_heads = shapes[f"{delta}A_log"][0]
    value_width = shapes[f"{delta}norm.weight"][0]
    key_width = config_json.get("linear_key_head_dim", value_width)
    # q and k have the same number of rows; v has one head for each value of A_log
    key_rows = (shapes[f"{delta}in_proj_qkv.weight"][0] - value_heads * value_width) // 2
    if type(key_width) is not int or key_width < 1 or key_rows < key_width or key_rows % key_width:
        raise ValueError(f"linear_key_head_dim {key_width} for {key_rows} key rows")
    if value_heads % (key_rows // key_width):
        raise ValueError(f"linear_key_head_dim {key_width} for {value_heads} value heads")
    kinds = []
    for index in range(num_layers):
        # other layers have full attention
        kinds.append(LINEAR_ATTENTION if f"layers.{index}.{LINEAR}" in shapes else FULL_ATTENTION)
    return {
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": value_width,
        "linear_num_key_heads": key_rows // key_width,
        "linear_key_head_dim": key_width,
        "linear_conv_kernel_dim": shapes[f"{delta}conv1d.weight"][-1],
        "layer_types": kinds,
    }


QWEN35 = LanguageModel(
    description="the language model of Qwen3.5",
    option="--text_encoder",
    files="qwen3.5_9b_bf16.safetensors of Comfy-Org, or the folder text_encoder of MOSS-Image,",
    class_prefix="Qwen3_5Text",
    kind="qwen3_5",
    word_key="qwen35_9b",
    defaults={"hidden_size": 4096, "num_attention_heads": 16, "rope_theta": 1e7, "rms_norm_eps": 1e-6},
    theta=1e7,
    eps=1e-6,
    head_width=256,
    distinguishing_tensors=(Q_NORM, LINEAR),
    rope_types=("default", "mrope"),
    tower=QWEN35_TOWER,
    read_settings=_read_delta_layers,
    partial_rotary_factor=0.25,
    mrope_sixteenths=(),
    first_attention_layer=3,
    query_chunks=2,
    keep_float32=("linear_attn.A_log", "linear_attn.dt_bias"),  # exponents, which 16 bits would round
    min_transformers="5.3",
)


# Ministral 3's rotary frequencies, YaRN (Peng et al. 2023, arXiv 2309.00071). Source: the config.json of
# baidu/ERNIE-Image. Its scores also grow with the logarithm of positions, from position 16384 on; texts are
# shorter.
_YARN = {
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def _read_yarn(config_json: Mapping[str, Any], *_: Any) -> Mapping[str, Any]:
    """Return the settings of YaRN under transformers' names; what config.json lacks is as released."""
    rope = config_json.get("rope_parameters") or config_json.get("rope_scaling") or {}
    numbers = {name: type(value)(rope.get(name, value)) for name, value in _YARN.items()}
    if not all(0 < number < math.inf for number in numbers.values()):
        raise ValueError(f"rope_parameters {numbers}")
    return {
        "rope_scaling": {"rope_type": "yarn", **numbers},
        "max_position_embeddings": int(numbers["factor"] * numbers["original_max_position_embeddings"]),
    }


MINISTRAL3 = LanguageModel(
    description="the language model of Ministral 3",
    option="--text_encoder",
    files="ministral-3-3b.safetensors of Comfy-Org, or the folder text_encoder of baidu/ERNIE-Image,",
    # with the same frequencies, its class in transformers 5 computes the same as this one
    class_prefix="Mistral",
    kind=("ministral3", "mistral"),  # copies of its config.json have the second
    word_key="ministral3_3b",
    defaults={"hidden_size": 4096, "num_attention_heads": 32, "rms_norm_eps": 1e-5},
    theta=1e6,
    eps=1e-5,
    rope_types=("yarn",),
    read_settings=_read_yarn,
    settings={"sliding_window": None},
)


@dataclass(frozen=True)
class LanguageConfig:
    """Dimensions of a language model, and how many of its layers to run."""

    vocabulary: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    num_layers: int  # layers to run; those after the last state that is read are left out
    final_norm: bool  # whether the final norm is applied
    theta: float = LLAMA.theta  # base of the rotary frequencies
    eps: float = LLAMA.eps
    model: LanguageModel = LLAMA
    sections: tuple[int, ...] = ()  # frequencies for time, rows and columns; (): from `mrope_sixteenths`
    settings: Mapping[str, Any] = field(default_factory=dict)  # from `LanguageModel.read_settings`

    @property
    def settings_text(self) -> str:
        """The model's settings as text for cache records; a comma precedes each."""
        return "".join(f", {name} {value}" for name, value in self.settings.items())


class ConfigConstants(NamedTuple):
    """Language model settings that cannot be read from its tensors."""

    theta: float  # base of the rotary frequencies
    eps: float
    sections: tuple[int, ...]  # frequencies for time, rows and columns
    settings: Mapping[str, Any]


def read_language_model(
    checkpoint: Checkpoint,
    model: LanguageModel,
    states: Sequence[int] = (-1,),
    final_norm: bool = False,
    pre_norm: bool = False,
) -> LoadPlan[LanguageConfig]:
    """Plan how to load a language model up to the last state that is used.

    1. Find the model's tensors in the file, under any published prefix; weights may have 16 or 8 bits.
    2. Read the dimensions from the tensor shapes.
    3. Read what shapes do not show from a config.json, if there is one.

    Args:
        checkpoint: The opened file.
        model: Kind of model that the file must contain.
        states: Indices of the hidden states to use, ascending, or ALL_STATES. State n is the output of n
            layers. Negative indices count from the end; -1 is the last state after the final norm.
        final_norm: Whether to apply the final norm to the last state even if it is not -1.
        pre_norm: Whether to omit the final norm even if the last state is -1.

    Raises:
        CheckpointError: If the file contains another model or has too few layers.
    """
    path = checkpoint.path
    layer = f"layers.{model.first_attention_layer}."  # prefix of a layer with attention
    network = _find_language_model(checkpoint, model, layer)
    sources = list_tensor_sources(network)
    shape = make_shape_reader(network, sources, _make_wrong_sizes_error(path, model))
    all_layers = count(sources, r"layers\.\d+", path)
    states = states or all_states(all_layers)
    num_layers = _count_layers_before(states[-1], all_layers, path, model)  # only these are loaded
    vocabulary, dim = shape("embed_tokens.weight", 2)
    query_rows = shape(f"{layer}{Q_PROJ}", 2)[0] // model.query_chunks
    key_rows = shape(f"{layer}self_attn.k_proj.weight", 2)[0]
    config_json = _read_config_json(path, network, model, dim)
    head_dim = _find_head_dim(path, model, shape, config_json, query_rows)
    _check_heads(path, head_dim, query_rows=query_rows, key_rows=key_rows, dim=dim, model=model)
    shapes = {name: network.tensors[source.names[0]].shape for name, source in sources.items()}
    constants = _read_config_constants(
        path,
        config_json,
        model=model,
        num_layers=num_layers,
        width=head_dim,
        shapes=shapes,
    )
    config = LanguageConfig(
        vocabulary=vocabulary,
        dim=dim,
        ffn_dim=shape("layers.0.mlp.gate_proj.weight", 2)[0],
        num_heads=query_rows // head_dim,
        num_kv_heads=key_rows // head_dim,
        head_width=head_dim,
        num_layers=num_layers,
        final_norm=not pre_norm and (final_norm or states[-1] == -1),
        theta=constants.theta,
        eps=constants.eps,
        model=model,
        sections=constants.sections,
        settings=constants.settings,
    )
    return LoadPlan(config, network, sources, _list_unused_names(config, all_layers))


def _make_wrong_sizes_error(path: Path, model: LanguageModel) -> CheckpointError:
    """Return the error for a file whose tensors do not have the sizes of the model."""
    return CheckpointError(
        f"{path}: its tensors do not have the sizes of {model.description}. Pass {model.files} to "
        f"{model.option}.",
        path,
    )


def _read_config_json(path: Path, network: Checkpoint, model: LanguageModel, dim: int) -> Mapping[str, Any]:
    """Return settings that tensor shapes do not show, from a config.json if there is one, else defaults."""
    return read_network_config(
        path,
        "text_config",
        kind=model.kind,
        dim=dim,
        defaults=model.defaults,
        embedded_config=network.metadata.get(model.config_key),
    )


def _find_language_model(checkpoint: Checkpoint, model: LanguageModel, layer: str) -> Checkpoint:
    """Return a file's language model tensors without their prefix."""
    # Raise CheckpointError for another model.
    # `layer` is the prefix of a layer with attention.
    network = find_network(checkpoint, "embed_tokens.weight", f"{layer}{Q_PROJ}", OTHER_TENSORS)
    # tensors that only some models have, such as biases and norms, tell the models apart
    if (
        network is None
        or _list_distinguishing_tensors(network, checkpoint, layer) != model.distinguishing_tensors
    ):
        raise make_wrong_kind_error(checkpoint, model.description, model.option, model.files)
    return network


def _find_head_dim(
    path: Path,
    model: LanguageModel,
    shape: Callable[..., tuple[int, ...]],
    config_json: Mapping[str, Any],
    query_rows: int,
) -> int:
    """Return the attention head width, from the query norm's weight or config.json."""
    if Q_NORM in model.distinguishing_tensors:  # it has one value for each channel of a head
        return shape(f"layers.{model.first_attention_layer}.{Q_NORM}", 1)[0]
    # The attention head width from config.json; the default is the released model's.
    width = config_json.get("head_dim")
    return head_width(
        path, query_rows, config_json, (width if isinstance(width, int) and width > 0 else model.head_width)
    )


def _list_unused_names(config: LanguageConfig, all_layers: int) -> tuple[str, ...]:
    """Return name patterns of the tensors to skip when loading a file with `all_layers` layers."""
    names = [*_COMPUTED]
    names += [f"{start}*" for start in OTHER_TENSORS]
    names += [f"layers.{index}.*" for index in range(config.num_layers, all_layers)]
    if not config.final_norm:
        names.append("norm.weight")
    return tuple(names)


def _can_be_heads(width: int, query_rows: int, key_rows: int, dim: int) -> bool:
    """Return whether queries and keys can be divided into heads of this width; `dim` is the model's width."""
    # the width must be even, because rotary embedding rotates pairs of channels
    if width < 2 or width % 2 or query_rows % width or key_rows % width:
        return False
    num_heads = query_rows // width
    num_kv_heads = key_rows // width
    # grouped-query attention: each key head serves the same number of query heads
    return dim % max(1, num_heads) == 0 and num_heads % max(1, num_kv_heads) == 0


def _check_heads(
    path: Path, width: int, query_rows: int, key_rows: int, dim: int, model: LanguageModel
) -> None:
    """Raise CheckpointError if the query and key rows cannot be divided into heads of this width."""
    # in Qwen2.5-VL, all heads together have the width of the model
    has_model_width = Q_BIAS not in model.distinguishing_tensors or query_rows == dim
    if not has_model_width or not _can_be_heads(width, query_rows, key_rows, dim):
        raise CheckpointError(
            f"{path}: {query_rows} rows of queries and {key_rows} of keys cannot be divided into heads of "
            f"{width} channels. Put the model's config.json next to it, or pass another copy of the file.",
            path,
        )


def _count_layers_before(state: int, all_layers: int, path: Path, model: LanguageModel) -> int:
    """Return the number of layers before a state, which may be counted from the end (negative)."""
    # -1 is the state after all layers
    num_layers = state if state >= 0 else all_layers + 1 + state
    if 0 <= num_layers <= all_layers:
        return num_layers
    # the user chose the state, as a number of layers to skip
    if model.skip_option:
        raise CheckpointError(
            f"{model.skip_option} {-1 - state}: {path} has only {all_layers} layers. Use a smaller number.",
            path,
        )
    raise CheckpointError(
        f"{path} has only {all_layers} layers, but {abs(state)} are needed. "
        f"Pass {model.files} to {model.option}.",
        path,
    )


def _list_distinguishing_tensors(network: Checkpoint, file: Checkpoint, layer: str) -> tuple[str, ...]:
    """Return which of the tensors that distinguish the supported language models a file contains."""
    # `layer` is the prefix of the first layer with full attention; models with LINEAR have none in layer 0.
    found = [tensor for tensor in _DISTINGUISHING_TENSORS if f"{layer}{tensor}" in network.tensors]
    if f"layers.0.{LINEAR}" in network.tensors:
        return (*found, LINEAR)  # only one model has it, so the vision tower need not be looked up
    if any(name.endswith(TOWER_POSITIONS) for name in file.tensors):
        found.append(TOWER_POSITIONS)
    return tuple(found)


def _read_config_constants(
    path: Path,
    config_json: Mapping[str, Any],
    model: LanguageModel,
    num_layers: int,
    width: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> ConfigConstants:
    """Read settings that tensors do not show from config.json; the released model's are the defaults."""
    # `width` is the number of channels of an attention head.
    try:
        # transformers 5 renamed rope_scaling to rope_parameters
        rope = config_json.get("rope_parameters") or config_json.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", model.rope_types[0]))
        theta = float(rope.get("rope_theta", config_json.get("rope_theta", model.theta)))
        eps = float(config_json.get("rms_norm_eps", model.eps))
        rotary_dim = int(width * model.partial_rotary_factor)
        sections = () if model.mrope_sixteenths is None else _read_sections(rope, rotary_dim)
        if not (0 < theta < math.inf and 0 <= eps < math.inf):
            raise ValueError(f"rope_theta {theta}, rms_norm_eps {eps}")
        settings = model.read_settings(config_json, num_layers, width, shapes)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: the config.json next to it cannot be read ({error}). Copy it again, or remove it.", path
        ) from error
    if rope_type not in model.rope_types:
        raise CheckpointError(
            f"{path}: its config.json asks for rotary frequencies of type {rope_type}, which the model that "
            f"the transformer was trained with does not use. Pass {model.files} to {model.option}.",
            path,
        )
    return ConfigConstants(theta, eps, sections, settings)


def _read_sections(rope: Mapping[str, Any], width: int) -> tuple[int, ...]:
    """Return how many rotary frequencies encode time, rows and columns; () without `mrope_section`."""
    sections = tuple(map(int, rope.get("mrope_section", ())))
    if sections and (len(sections) != 3 or min(sections) < 1 or 2 * sum(sections) != width):
        raise ValueError(f"mrope_section {list(sections)} for heads of {width} channels")
    return sections


def all_states(num_layers: int) -> tuple[int, ...]:
    """Return the indices of all hidden states: 0 for embeddings, then layers; -1 for the last, normalized."""
    return (*range(num_layers), -1)


class HostAngles(nn.Module):
    """Rotary embedding of a transformers model, computed on the CPU in float32 and sent to the device.

    On the device it might be computed in TF32, which cannot distinguish positions above 1024.
    """

    def __init__(self, angles: nn.Module) -> None:
        super().__init__()
        self._angles = (angles,)  # in a tuple, so that it is not a submodule and stays on the CPU

    def forward(self, x: Tensor, position_ids: Tensor, *layers: str) -> tuple[Tensor, ...]:
        """Return the rotary embedding's cosines and sines, in the dtype and on the device of x.

        `position_ids` are on the CPU. `layers` is SLIDING_ATTENTION or FULL_ATTENTION if the frequencies of
        these layers differ.
        """
        parts = self._angles[0](torch.empty(0, dtype=x.dtype), position_ids, *layers)
        return tuple(send_ahead(part, x.device) for part in parts)


def build_language_model(config: LanguageConfig) -> nn.Module:
    """Build the network, a transformers model; call this inside `on_meta_device`."""
    # The arguments of the model's config class in transformers
    settings: dict[str, Any] = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.eps,
        "rope_theta": config.theta,
        "use_cache": False,
        # the defaults may be larger than the vocabulary of the file
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        "attn_implementation": "sdpa",
        **config.model.settings,
        **config.settings,
    }
    sections = _split_frequencies(config)
    if sections:
        settings["rope_scaling"] = {"rope_type": "default", "mrope_section": sections}
    if config.model.partial_rotary_factor != 1:
        settings["rope_scaling"]["partial_rotary_factor"] = config.model.partial_rotary_factor
    # The classes of a model; raise OptionError if the installed transformers lacks them
    import transformers

    if not hasattr(transformers, f"{config.model.class_prefix}Model"):
        raise OptionError(
            f"{config.model.description} needs transformers {config.model.min_transformers} or later, not "
            f"{transformers.__version__}: pip install --upgrade transformers"
        )
    classes = _TransformersClasses(
        config=getattr(transformers, f"{config.model.class_prefix}Config"),
        network=getattr(transformers, f"{config.model.class_prefix}Model"),
    )
    transformers_config = classes.config(**settings)
    network: Any = classes.network(transformers_config)
    if not config.final_norm:
        network.norm = nn.Identity()
    with torch.device("cpu"):  # on the meta device, these tensors would have no values, and no file has them
        network.rotary_emb = HostAngles(type(network.rotary_emb)(transformers_config))
        if hasattr(network.embed_tokens, "embed_scale"):  # Gemma
            network.embed_tokens.embed_scale = torch.tensor(config.dim**0.5)
    network.spec = SPEC
    built: nn.Module = network
    return built


class _TransformersClasses(NamedTuple):
    """The classes of a model in transformers."""

    config: Callable[..., Any]
    network: Callable[..., Any]


def _split_frequencies(config: LanguageConfig) -> list[int]:
    """Return how many rotary frequencies encode time, rows and columns; [] for a text-only model."""
    if config.model.mrope_sixteenths is None:
        return []
    if config.sections:
        return list(config.sections)
    frequencies = int(config.head_width * config.model.partial_rotary_factor) // 2
    if not config.model.mrope_sixteenths:
        # thirds; the first axes get the remainder
        return [(frequencies + 2 - axis) // 3 for axis in range(3)]
    time_share, row_share, _ = config.model.mrope_sixteenths  # in sixteenths
    num_time = frequencies * time_share // 16
    num_row = frequencies * row_share // 16
    return [num_time, num_row, frequencies - num_time - num_row]


def load_language_model(
    path: Path,
    model: LanguageModel,
    device: torch.device,
    dtype: torch.dtype,
    states: Sequence[int] = (-1,),
    final_norm: bool = False,
    form: str | None = None,
    free_bytes: int | None = None,
    blocks: BlockSharder | None = None,
    pre_norm: bool = False,
) -> nn.Module:
    """Load a language model up to the last state that is used.

    1. Read the dimensions from the file's header.
    2. Decide how many layers stay in host memory because they do not fit on the device.
    3. Load the weights, and hook those layers so that each is copied to the device before it runs.

    Args:
        path: File or folder of the model.
        model: Kind of model that the file must contain.
        device: Device to load to.
        dtype: Compute dtype.
        states: Indices of the hidden states to use, ascending, or ALL_STATES. State n is the output of n
            layers; negative indices count from the end.
        final_norm: Whether to apply the final norm to the last state even if it is not -1.
        form: Module of `checkpoints.stored` that quantizes the weights; None keeps the file's form, except
            that fp8 weights are dequantized.
        free_bytes: Free bytes on the device; None means that all layers fit.
        blocks: Splits the layers over processes; None for all layers here.
        pre_norm: Whether to omit the final norm even if the last state is -1.

    Raises:
        CheckpointError: If the file is damaged, contains another model, or has an unsupported form.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_language_model(checkpoint, model, states, final_norm, pre_norm)
        num_streamed, layer_bytes = plan_streamed_layers(plan, dtype, form, free_bytes)
        streamed_weights = host_weights(SwapPlan(SPEC, num_streamed), device)
        name_in_messages = f"the language model ({model.option})"
        if num_streamed:
            logger.info(
                "%s does not fit on the device: "
                "%d of its %d layers (%.1f GB) come from host memory each time",
                name_in_messages,
                num_streamed,
                plan.config.num_layers,
                num_streamed * layer_bytes / 1e9,
            )
        float32_suffixes = model.keep_float32
        network = load_planned(
            plan,
            build_language_model,
            device=device,
            dtype=lambda name, _: torch.float32 if name.endswith(float32_suffixes) else dtype,
            label=name_in_messages,
            form=form,
            host=streamed_weights,
            blocks=blocks,
        )
    swap_blocks(network, streamed_weights, device)
    return network


class StreamedLayers(NamedTuple):
    """How many layers stay in host memory until they run, and the size of one layer."""

    num_streamed: int
    layer_bytes: int


def plan_streamed_layers(
    plan: LoadPlan[LanguageConfig], dtype: torch.dtype, form: str | None, free_bytes: int | None
) -> StreamedLayers:
    """Return how many layers must stay in host memory because they do not fit on the device.

    Args:
        plan: The plan of the language model.
        dtype: Dtype of weights that are not quantized.
        form: Module of `checkpoints.stored` that quantizes the projections, or None.
        free_bytes: Free bytes on the device; None means enough for all layers.
    """
    config = plan.config
    if free_bytes is None or config.num_layers < 2:
        return StreamedLayers(0, 0)
    layer_bytes = 0
    for name in plan.sources:
        if name.startswith("layers.0."):
            is_projection = name.endswith("_proj.weight")  # only projections are quantized
            layer_bytes += loaded_bytes(plan, name, dtype, form if is_projection else None)
    embedding_bytes = config.vocabulary * config.dim * dtype.itemsize
    excess = config.num_layers * layer_bytes + embedding_bytes + WORKING - free_bytes  # bytes that do not fit
    num_streamed = max(math.ceil(excess / layer_bytes), 0)
    max_streamed = config.num_layers - 1  # one layer must be on the device to run
    return StreamedLayers(min(num_streamed, max_streamed), layer_bytes)
