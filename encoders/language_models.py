"""Language models as text encoders: files in every layout, and networks of the classes of transformers.

Only the layers before the last state that is read are built and loaded, and never the head that predicts
words. They are published under several prefixes, alone or beside an image tower: the prefix is whatever
precedes the name of the token embeddings. Dimensions come from the tensors; what these do not show comes from
a config.json beside them, else from the facts about the released model.
"""
# Letters: B prompts, L tokens, C width of the model, D width of a head

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoders.vision_towers import PLACES as TOWER_PLACES
from encoders.vision_towers import QWEN3_TOWER, QWEN25_TOWER, VisionTower
from modules.checkpoints.dialects import LoadPlan, count, load_planned, loaded_bytes, other_kind, shapes_of
from modules.checkpoints.encoders import SPIECE_MODEL, head_width, network_in, told_beside
from modules.checkpoints.opening import Checkpoint, open_checkpoint, plain_sources
from modules.contract.family import DitSpec
from modules.contract.loading import BlockPlace
from modules.devices import send_ahead
from modules.errors import CheckpointError, OptionError
from modules.offload.block_swap import swap_blocks
from modules.offload.swap_plan import SwapPlan, host_weights

logger = logging.getLogger(__name__)

SPEC = DitSpec(block_lists=("layers",))
WORKING = 3 << 29  # bytes beside the weights while prompts of the usual length are read
Q_BIAS, Q_NORM = "self_attn.q_proj.bias", "self_attn.q_norm.weight"
FEED_NORM = "pre_feedforward_layernorm.weight"  # Gemma has it
SCALAR = "layer_scalar"  # Gemma 4 has it
# tensors of a layer that some kinds of models have
_MARKS = (Q_BIAS, Q_NORM, FEED_NORM, SCALAR)
PLACES = f"visual.{TOWER_PLACES}"  # of Qwen3-VL's tower: the layers of its text half look like Qwen3's
_PARTS = (
    *("lm_head.", "visual.", "vision_tower.", "vision_model.", "multi_modal_projector.", "image_newline"),
    *("audio_projector.", "vision_embedder.", "embed_vision.", "embed_audio."),  # Gemma 4's
)
ALL_STATES: tuple[int, ...] = ()  # the embeddings, the states behind each layer, the last one normed
NEAR, FAR = "sliding_attention", "full_attention"  # kinds of layers: tokens see a window, or all before them
# beginnings of the names of tensors beside the wanted network: other parts of the same model, and the bytes
# of files such as a tokenizer's
BESIDE = (
    *(f"{prefix}{part}" for prefix in ("", "model.", "language_model.") for part in _PARTS),
    *("tokenizer", "tekken_model", "logit_scale", SPIECE_MODEL, "hf_asset__", "text_embedding_projection."),
)
# saved by old versions of transformers; computed here
_COMPUTED = ("rotary_emb.inv_freq", "layers.*.rotary_emb.inv_freq")


@dataclass(frozen=True)
class LanguageModel:
    """Facts about a kind of released language models that its tensors do not show."""

    what: str  # for messages: "a Llama language model"
    option: str  # that names its file
    files: str  # which files are one, for messages
    classes: str  # of transformers, without "Config" and "Model"
    kind: str  # prefix of `model_type` in a config.json
    defaults: Mapping[str, float]  # values that its config.json leaves out
    theta: float  # base of the rotary frequencies, if there is no config.json
    eps: float  # likewise
    head_width: int = 128  # likewise, if the tensors do not show it
    marks: tuple[str, ...] = ()  # those of `_MARKS` that its layers have, and PLACES beside them
    rope_types: tuple[str, ...] = ("default",)  # kinds of rotary frequencies that are plain ones for a text
    # sixteenths of the frequencies that are for time, rows and columns; None: text only
    grid_shares: tuple[int, int, int] | None = None
    tower: VisionTower | None = None  # that sees pictures in prompts
    skip_option: str = ""  # that chooses the state by the number of layers behind it
    settings: Mapping[str, Any] = field(default_factory=dict)  # further ones of transformers' configuration
    # likewise, made of a config.json's values ({} if there is none), the number of layers that are run, the
    # channels of a head, and the shapes of all tensors by their names
    read_settings: Callable[
        [Mapping[str, Any], int, int, Mapping[str, tuple[int, ...]]], Mapping[str, Any]
    ] = lambda *_: {}
    told_key: str = ""  # of the config.json in the metadata of its file
    since: str = ""  # the first version of transformers that has its classes; "": all that serve


LLAMA = LanguageModel(
    what="a Llama language model",
    option="--text_encoder1",
    files=(
        "the folder text_encoder of HunyuanVideo, llava-llama-3-8b-v1_1-transformers or "
        "llava_llama3_fp16.safetensors"
    ),
    classes="Llama",
    kind="llama",
    defaults={"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    theta=500000.0,
    eps=1e-5,
    skip_option="--hidden_state_skip_layer",
)
QWEN25_VL = LanguageModel(
    what="the language model of Qwen2.5-VL",
    option="--text_encoder",
    files="qwen_2.5_vl_7b.safetensors of Comfy-Org, or the folder of Qwen/Qwen2.5-VL-7B-Instruct,",
    classes="Qwen2_5_VLText",
    kind="qwen2",
    defaults={"hidden_size": 8192, "num_attention_heads": 64, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    theta=1e6,
    eps=1e-6,
    marks=(Q_BIAS,),
    rope_types=("default", "mrope"),
    grid_shares=(4, 6, 6),
    tower=QWEN25_TOWER,
    settings={"use_sliding_window": False},
)
QWEN3 = LanguageModel(
    what="a Qwen3 language model",
    option="--text_encoder",
    files="qwen_3_4b.safetensors of Comfy-Org, or the folder of Qwen/Qwen3-4B,",
    classes="Qwen3",
    kind="qwen3",
    defaults={"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
    theta=1e6,
    eps=1e-6,
    marks=(Q_NORM,),
    settings={"use_sliding_window": False},
)
QWEN3_VL = LanguageModel(
    what="the language model of Qwen3-VL",
    option="--text_encoder",
    files="qwen3vl_4b_bf16.safetensors of Comfy-Org, or the folder of Qwen/Qwen3-VL-4B-Instruct,",
    classes="Qwen3VLText",
    kind="qwen3_vl",
    defaults={"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 5e6, "rms_norm_eps": 1e-6},
    theta=5e6,
    eps=1e-6,
    marks=(Q_NORM, PLACES),
    rope_types=("default", "mrope"),
    grid_shares=(6, 5, 5),
    tower=QWEN3_TOWER,
)


@dataclass(frozen=True)
class LanguageConfig:
    """Dimensions of a language model, and how much of it is run."""

    vocabulary: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    num_layers: int  # that are run; layers after the last state that is read are left out
    final_norm: bool
    theta: float = LLAMA.theta  # base of the rotary frequencies
    eps: float = LLAMA.eps
    model: LanguageModel = LLAMA
    sections: tuple[int, ...] = ()  # frequencies for time, rows and columns; (): by the model's shares
    settings: Mapping[str, Any] = field(default_factory=dict)  # of `LanguageModel.read_settings`

    @property
    def further(self) -> str:
        return "".join(f", {name} {value}" for name, value in self.settings.items())


def read_language_model(
    checkpoint: Checkpoint, model: LanguageModel, states: Sequence[int] = (-1,), final_norm: bool = False
) -> LoadPlan[LanguageConfig]:
    """Plan how to load the language model up to the last of the states that are read.

    Reads files with all published prefixes, in 16 or 8 bits. model: the kind that it has to be. states: which
    states are read, each as the number of layers before it, ascending; negative numbers count from the end
    (-1: the last state, normed); or ALL_STATES. final_norm: norm the last of them even if it is not -1.
    Raises CheckpointError for any other file, or one with fewer layers.
    """
    path = checkpoint.path
    own = network_in(checkpoint, "embed_tokens.weight", "layers.0.self_attn.q_proj.weight", BESIDE)
    if own is None or model.marks != _marks_of(own, checkpoint):
        raise other_kind(checkpoint, model.what, model.option, model.files)
    sources = plain_sources(own)
    damaged = f"{path}: its tensors do not have the sizes of {model.what}. Give {model.files} to"
    shape = shapes_of(own, sources, CheckpointError(f"{damaged} {model.option}.", path))
    all_layers = count(sources, r"layers\.\d+", path)
    states = states or all_states(all_layers)
    num_layers = _layers_before(states[-1], all_layers, path, model)
    vocabulary, dim = shape("embed_tokens.weight", 2)
    rows, key_rows = (shape(f"layers.0.self_attn.{letter}_proj.weight", 2)[0] for letter in "qk")
    written = own.metadata.get(model.told_key)
    told = told_beside(path, "text_config", model.kind, dim, model.defaults, written)
    said = told.get("head_dim")
    head = said if isinstance(said, int) and said > 0 else model.head_width
    width = shape(f"layers.0.{Q_NORM}", 1)[0] if Q_NORM in model.marks else head_width(path, rows, told, head)
    # Qwen2.5-VL's heads are as wide together as the model; frequencies come in pairs
    is_uneven = width < 2 or width % 2 or key_rows % width or rows % width or dim % (rows // width or 1)
    if is_uneven or (rows // width) % max(1, key_rows // width) or (Q_BIAS in model.marks and rows != dim):
        raise CheckpointError(
            f"{path}: {rows} rows of queries and {key_rows} of keys cannot be divided into heads of {width} "
            "channels. Put the model's config.json beside it, or give another copy of the file.",
            path,
        )
    shapes = {name: own.tensors[source.names[0]].shape for name, source in sources.items()}
    theta, eps, sections, settings = _read_constants(path, told, model, num_layers, width, shapes)
    is_normed = final_norm or states[-1] == -1
    config = LanguageConfig(
        vocabulary=vocabulary,
        dim=dim,
        ffn_dim=shape("layers.0.mlp.gate_proj.weight", 2)[0],
        num_heads=rows // width,
        num_kv_heads=key_rows // width,
        head_width=width,
        num_layers=num_layers,
        final_norm=is_normed,
        theta=theta,
        eps=eps,
        model=model,
        sections=sections,
        settings=settings,
    )
    unused = (
        *_COMPUTED,
        *(f"{start}*" for start in BESIDE),
        *(f"layers.{index}.*" for index in range(num_layers, all_layers)),
        *(() if is_normed else ("norm.weight",)),
    )
    return LoadPlan(config, own, sources, unused)


def _layers_before(state: int, all_layers: int, path: Path, model: LanguageModel) -> int:
    num_layers = state if state >= 0 else all_layers + 1 + state
    if not 0 <= num_layers <= all_layers:
        chosen = f"{model.skip_option} {-1 - state}: " if model.skip_option else ""
        remedy = "a smaller number" if model.skip_option else f"{model.files} to {model.option}"
        needed = f"has only {all_layers} layers" + ("" if chosen else f", {abs(state)} are needed")
        raise CheckpointError(f"{chosen}{path} {needed}. Give {remedy}.", path)
    return num_layers


def _marks_of(own: Checkpoint, whole: Checkpoint) -> tuple[str, ...]:
    found = [mark for mark in _MARKS if f"layers.0.{mark}" in own.tensors]
    return (*found, *([PLACES] if any(name.endswith(PLACES) for name in whole.tensors) else []))


def _read_constants(
    path: Path,
    told: Mapping[str, Any],
    model: LanguageModel,
    num_layers: int,
    width: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[float, float, tuple[int, ...], Mapping[str, Any]]:
    """Return the base of the rotary frequencies, the norms' epsilon, sections of frequencies, and settings.

    Raises CheckpointError if the frequencies are stretched, as in Llama 3.1 and later.
    """
    try:
        rope = told.get("rope_parameters") or told.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        theta = float(rope.get("rope_theta", told.get("rope_theta", model.theta)))
        eps = float(told.get("rms_norm_eps", model.eps))
        sections = tuple(map(int, rope.get("mrope_section", ()))) if model.grid_shares else ()
        if sections and (len(sections) != 3 or min(sections) < 1 or 2 * sum(sections) != width):
            raise ValueError(f"mrope_section {list(sections)} for heads of {width} channels")
        if not (0 < theta < math.inf and 0 <= eps < math.inf):
            raise ValueError(f"rope_theta {theta}, rms_norm_eps {eps}")
        settings = model.read_settings(told, num_layers, width, shapes)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: the config.json beside it cannot be read ({error}). Copy it again, or remove it.", path
        ) from error
    if kind not in model.rope_types:
        raise CheckpointError(
            f"{path}: its config.json asks for rotary frequencies of type {kind}, which the model that "
            f"the transformer was trained with does not use. Give {model.files} to {model.option}.",
            path,
        )
    return theta, eps, sections, settings


def all_states(num_layers: int) -> tuple[int, ...]:
    return (*range(num_layers), -1)


class HostAngles(nn.Module):
    """Rotary embedding of a model of transformers, computed on the CPU in float32 and sent to the device.

    On the device products may be in TF32, which cannot tell positions above 1024 apart.
    """

    def __init__(self, angles: nn.Module) -> None:
        super().__init__()
        self._angles = (angles,)  # no submodule: it stays on the CPU

    def forward(self, x: Tensor, position_ids: Tensor, *layers: str) -> tuple[Tensor, ...]:
        """Return cosine and sine in the dtype of x, on its device.

        position_ids: on the CPU. layers: NEAR or FAR, if these have frequencies of their own.
        """
        found = self._angles[0](torch.empty(0, dtype=x.dtype), position_ids, *layers)
        return tuple(send_ahead(part, x.device) for part in found)


def build_language_model(config: LanguageConfig) -> nn.Module:
    """Build the network, a class of transformers, for `on_meta_device`; its state dict has bare names."""
    import transformers

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
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        "attn_implementation": "sdpa",
        **config.model.settings,
        **config.settings,
    }
    if config.model.grid_shares is not None:
        half, (time, rows, _) = config.head_width // 2, config.model.grid_shares
        shares = half * time // 16, half * rows // 16
        sections = config.sections or (*shares, half - sum(shares))
        settings["rope_scaling"] = {"rope_type": "default", "mrope_section": list(sections)}
    classes = config.model.classes
    if not hasattr(transformers, f"{classes}Model"):
        raise OptionError(
            f"{config.model.what} needs transformers {config.model.since} or later, not "
            f"{transformers.__version__}: pip install --upgrade transformers"
        )
    told = getattr(transformers, f"{classes}Config")(**settings)
    network: Any = getattr(transformers, f"{classes}Model")(told)
    if not config.final_norm:
        network.norm = nn.Identity()
    with torch.device("cpu"):
        network.rotary_emb = HostAngles(type(network.rotary_emb)(told))
        if hasattr(network.embed_tokens, "embed_scale"):  # Gemma's, which no file holds
            network.embed_tokens.embed_scale = torch.tensor(config.dim**0.5)
    network.spec = SPEC
    built: nn.Module = network
    return built


def load_language_model(
    path: Path,
    model: LanguageModel,
    device: torch.device,
    dtype: torch.dtype,
    states: Sequence[int] = (-1,),
    final_norm: bool = False,
    form: str | None = None,
    room: int | None = None,
    blocks: BlockPlace | None = None,
) -> nn.Module:
    """Load the language model up to the last of the states that are read.

    form: as of `load_planned`; without one fp8 weights are dequantized. room: bytes free on the device;
    layers that do not fit stay in host memory, and each is copied to the device before it runs. None: all
    fit. blocks: takes each layer. model, states, final_norm: as for `read_language_model`. Raises
    CheckpointError if the file is damaged, holds another model, or has its weights in another form.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_language_model(checkpoint, model, states, final_norm)
        swapped, layer = streamed_layers(plan, dtype, form, room)
        host = host_weights(SwapPlan(SPEC, swapped), device)
        what = f"the language model ({model.option})"
        if swapped:
            text = (
                "%s does not fit on the device: %d of its %d layers (%.1f GB) come from host memory each time"
            )
            logger.info(text, what, swapped, plan.config.num_layers, swapped * layer / 1e9)
        network = load_planned(plan, build_language_model, device, dtype, what, form, host, blocks)
    swap_blocks(network, host, device)
    return network


def streamed_layers(
    plan: LoadPlan[LanguageConfig], dtype: torch.dtype, form: str | None, room: int | None
) -> tuple[int, int]:
    """Return how many layers have to stay in host memory, and the bytes of one.

    dtype, form: of the weights on the device. room: bytes free there; None: enough for all.
    """

    def size(name: str) -> int:
        return loaded_bytes(plan, name, dtype, form if name.endswith("_proj.weight") else None)

    if room is None or plan.config.num_layers < 2:
        return 0, 0
    first = [size(name) for name in plan.sources if name.startswith("layers.0.")]
    layers, others = plan.config.num_layers, plan.config.vocabulary * plan.config.dim * dtype.itemsize
    excess = layers * sum(first) + others + WORKING - room
    return min(max(math.ceil(excess / sum(first)), 0), layers - 1), sum(first)
