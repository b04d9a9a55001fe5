"""Checkpoints of the Wan transformers: their dialects, their variants, and loading."""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoints.dialects import make_wrong_kind_error, rename_sources, translate_name
from checkpoints.dits import DitFormat, DitHeader, bare_names
from checkpoints.encoders import read_config_json
from checkpoints.kinds import describe_file_kind
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from modules.errors import CheckpointError
from networks.names.layouts import tensor_patterns
from protocols.loading import TensorSource
from wan.bernini_options import find_named_sign
from wan.configs import BERNINI, HEAD_WIDTH, INPUT_CHANNELS, TASKS, VACE, VACE_DIM, WanConfig, WanTask
from wan.model import WanModel
from wan.names import WAN

logger = logging.getLogger(__name__)

# names of the kinds in `wan.configs.INPUT_CHANNELS` for messages
KIND_WORDS = {
    "t2v": "Wan T2V",
    "i2v": "Wan2.1 I2V",
    "flf2v": "Wan FLF2V",
    "fun-control": "Wan2.1 Fun-Control",
    "i2v-2.2": "Wan2.2 I2V",
    "ti2v": "Wan TI2V-5B",
    "fun-control-2.2": "Wan2.2 Fun-Control",
    VACE: "Wan VACE",
}

# Networks that share Wan's tensor names but need other inputs: prefix of a tensor that only they have, name
# of the model ({} is 2.1 or 2.2), remedy. Source: Wan-Video/Wan2.2 (S2V, Animate), VideoX-Fun.
OTHER_VARIANTS = (
    (
        "control_adapter.",
        "Wan{} Fun-Control-Camera (camera control)",
        "A Fun-Control checkpoint follows a control video: --task t2v-14B-FC or t2v-A14B-FC.",
    ),
    (
        ("casual_audio_encoder.", "audio_injector."),
        "Wan2.2 S2V (speech to video)",
        "Without sound, an image is animated by I2V: --task i2v-A14B.",
    ),
    (
        ("face_adapter.", "motion_encoder.", "pose_patch_embedding."),
        "Wan2.2 Animate (a character that follows a video)",
        "A Fun-Control checkpoint follows a video of poses: --task i2v-A14B-FC.",
    ),
)

# Names in diffusers' layout -> the published names; norm2 is the published norm3. Source: checkpoints of
# Wan-AI/*-Diffusers.
FROM_DIFFUSERS = tensor_patterns(WAN)


def identify(path: Path) -> str | None:
    """Return a hint about what a file contains, such as a Wan transformer; None for an unknown file."""
    try:
        with open_checkpoint(path) as checkpoint:
            bare = bare_names(checkpoint)
            kind = describe_file_kind(bare.tensors)
            if _is_wan(_list_shapes(bare)):
                if find_named_sign(path):
                    return "it is Bernini-R (--dit) for --task bernini-1.3B or bernini-14B"
                return f"it is a Wan transformer (--dit) for --task {_join_model_names(_read_header(bare))}"
            return None if kind is None else f"it looks like {kind}"
    except CheckpointError:
        return None


def check_task(header: DitHeader[WanConfig], task: WanTask, path: Path, option: str = "--dit") -> None:
    """Raise CheckpointError if a file is another kind of model than --task says. Any size is accepted.

    `option` is the option that named the file.
    """
    if header.config.kind != task.model_kind:
        versions = dict.fromkeys(f"Wan{TASKS[name].version}" for name in _list_fitting_tasks(header))
        raise CheckpointError(
            f"{path} does not fit --task {task.name}:\n"
            f"  {_describe_difference(header.config, task)} The file looks like "
            f"{_join_model_names(header)} of {' or '.join(versions)}.\n"
            f"  Use --task {_join_model_names(header)}, or pass a {KIND_WORDS[task.model_kind]} checkpoint "
            f"to {option}.",
            path,
        )


def log_task_differences(
    header: DitHeader[WanConfig], task: WanTask, path: Path, target: torch.dtype | None = None
) -> None:
    """Log what is unusual about a transformer's file: its dtype, its size, or an ambiguous version.

    Some versions have the same tensors, so only --task distinguishes them. `target` is the compute dtype.
    Warns if a large model stays in float32, the dtype in which A14B was released.
    """
    config = header.config
    if target == torch.float32 and header.block_dtype == target and config.dim >= TASKS["ti2v-5B"].dim:
        logger.warning(
            "%s is in float32 and stays so, which is slow and needs twice the memory of bfloat16. Pass "
            "--dit_dtype bfloat16 to convert it while it is read",
            path.name,
        )
    if config.dim != task.dim:
        logger.info(
            "%s has %d blocks of width %d, the released %s has width %d: the file is used as it is",
            path.name,
            config.num_layers,
            config.dim,
            task.name,
            task.dim,
        )
        return
    alike = [name for name in _list_fitting_tasks(header) if TASKS[name].version != task.version]
    if alike:
        logger.info(
            "%s is used as Wan%s %s, as --task says: a file of %s has the same tensors",
            path.name,
            task.version,
            task.name,
            " or ".join(alike),
        )


def _make_sources(checkpoint: Checkpoint, header: DitHeader[WanConfig]) -> Mapping[str, TensorSource]:
    # any dialect: a file of VACE's blocks may have a different one than the transformer
    return rename_sources(list_tensor_sources(checkpoint), lambda name: translate_name(name, FROM_DIFFUSERS))


def _list_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    tensors = checkpoint.tensors.items()
    return {translate_name(name, FROM_DIFFUSERS): tuple(info.shape) for name, info in tensors}


def _is_wan(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return len(shapes.get("patch_embedding.weight", ())) == 5 and "blocks.0.self_attn.q.weight" in shapes


def _read_header(checkpoint: Checkpoint) -> DitHeader[WanConfig]:
    """Read config and dialect of a checkpoint; raise CheckpointError for a variant that is not supported."""
    # The dialect says whose tensor names the file has: diffusers' or the official code's.
    names = checkpoint.tensors
    shapes = _list_shapes(checkpoint)
    dialect = "diffusers" if "condition_embedder.time_proj.weight" in names else "official"
    if not _is_wan(shapes):
        raise make_wrong_kind_error(
            checkpoint, "a Wan transformer", "--dit", "the checkpoint of a transformer"
        )
    path = checkpoint.path
    has_image = "blocks.0.cross_attn.k_img.weight" in shapes
    for start, variant, remedy in OTHER_VARIANTS:  # these need other inputs
        if any(name.startswith(start) for name in shapes):
            variant = variant.format("2.1" if has_image else "2.2")
            raise CheckpointError(f"{path} is {variant}, which is not supported.\n  {remedy}", path)
    in_dim = shapes["patch_embedding.weight"][1]
    if in_dim not in INPUT_CHANNELS[has_image].values():
        raise CheckpointError(
            f"{path} is an unknown variant of Wan with {in_dim} input channels, which is not supported.\n"
            "  Pass a T2V, I2V, FLF2V, TI2V, Fun-InP or Fun-Control checkpoint to --dit.",
            path,
        )
    block_weight = "blocks.0.attn1.to_q.weight" if dialect == "diffusers" else "blocks.0.self_attn.q.weight"
    return DitHeader(_read_config(path, shapes), dialect, names[block_weight].dtype)


def add_vace_header(checkpoint: Checkpoint, header: DitHeader[WanConfig], dit: Path) -> DitHeader[WanConfig]:
    """Return the header of a transformer combined with VACE's blocks from a separate file (--vace).

    Raises CheckpointError if that file is not VACE's or has a different size, or if the transformer has such
    blocks itself.
    """
    path = checkpoint.path
    config = header.config
    shapes = _list_shapes(bare_names(checkpoint))
    patch_shape = shapes.get("vace_patch_embedding.weight", ())
    layers = _count_blocks(shapes, "vace_blocks")
    # VACE's patch embedding is a 3D convolution, with a weight of out in frames rows columns
    if len(patch_shape) != 5 or patch_shape[1] != VACE_DIM or not layers:
        raise CheckpointError(f"--vace {path}: it has no blocks of VACE. Pass a file with vace_blocks.", path)
    width, channels, *_ = patch_shape
    if config.vace_layers:
        raise CheckpointError(f"{dit} already has blocks of VACE: omit --vace {path}.", path)
    if width != config.dim or config.num_layers % layers:
        raise CheckpointError(
            f"--vace {path}: {layers} blocks of width {width}; {dit} has {config.num_layers} of width "
            f"{config.dim}. Use files of the same model.",
            path,
        )
    _check_vace_block_indices(path, config.num_layers, layers)
    return replace(header, config=replace(config, vace_layers=layers, vace_dim=channels))


# axes of the weights that `_read_config` reads; GGUF files may lack leading sides of 1
_MIN_AXES = {
    "patch_embedding.weight": 5,
    "blocks.0.ffn.0.weight": 2,
    "time_embedding.0.weight": 2,
    "text_embedding.0.weight": 2,
    "head.head.weight": 2,
    "img_emb.proj.0.weight": 1,
    "img_emb.emb_pos": 2,
    "vace_patch_embedding.weight": 5,
}


_NEEDED = (
    "blocks.0.ffn.0.weight",
    "time_embedding.0.weight",
    "text_embedding.0.weight",
    "head.head.weight",
)


def _check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError if a weight that `_read_config` reads is missing or has too few axes."""
    missing = [name for name in _NEEDED if name not in shapes]
    if missing:
        raise CheckpointError(
            f"{path} is an incomplete Wan transformer without {', '.join(missing)}. Download it again.",
            path,
        )
    for name, axes in _MIN_AXES.items():
        shape = shapes.get(name)
        if shape is not None and (len(shape) < axes or 0 in shape):
            sizes = " x ".join(map(str, shape)) or "a single number"
            raise CheckpointError(f"{path} does not fit Wan: {name} is {sizes}. Download it again.", path)


def _read_config(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> WanConfig:
    """Read the dimensions of a Wan transformer from the shapes of its tensors."""
    _check_shapes(path, shapes)
    dim, in_dim, *patch = shapes["patch_embedding.weight"]  # of a Conv3d: dim in_dim frames rows columns
    layers = _count_blocks(shapes, "blocks")
    # VACE has a second, shorter stack of blocks; it adds to every n-th block of the first stack
    vace_layers = _count_blocks(shapes, "vace_blocks")
    vace_dim = shapes.get("vace_patch_embedding.weight", (0, 0))[1]
    if vace_layers:
        # Raise CheckpointError if VACE's blocks differ from the released ones in number, inputs or positions
        if layers % vace_layers or vace_dim != VACE_DIM:
            raise CheckpointError(
                f"{path}: {vace_layers} VACE blocks next to {layers} blocks, and a vace_patch_embedding for "
                f"{vace_dim} channels. Each VACE block must belong to the same number of other blocks, and "
                f"the embedding must have {VACE_DIM} channels. Download it again.",
                path,
            )
        _check_vace_block_indices(path, layers, vace_layers)
    if dim % HEAD_WIDTH:
        raise CheckpointError(
            f"{path}: width {dim} is not a multiple of {HEAD_WIDTH}, the head width of Wan models.", path
        )
    image_layer = shapes.get("img_emb.proj.0.weight")
    frames, rows, columns = patch[:3]
    return WanConfig(
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        freq_dim=shapes["time_embedding.0.weight"][1],
        text_dim=shapes["text_embedding.0.weight"][1],
        num_heads=dim // HEAD_WIDTH,
        num_layers=layers,
        vace_layers=vace_layers,
        vace_dim=vace_dim,
        in_dim=in_dim,
        out_dim=shapes["head.head.weight"][0] // (frames * rows * columns),
        patch_size=(frames, rows, columns),
        has_image="blocks.0.cross_attn.k_img.weight" in shapes,
        image_dim=image_layer[0] if image_layer else WanConfig.image_dim,
        image_positions=shapes["img_emb.emb_pos"][-2] if "img_emb.emb_pos" in shapes else 0,
        has_ref_conv="ref_conv.weight" in shapes,
    )


def _check_vace_block_indices(path: Path, layers: int, vace_layers: int) -> None:
    """Raise CheckpointError if config.json attaches VACE's blocks to other blocks than the released ones."""
    released = list(range(0, layers, layers // vace_layers))
    file, settings = read_config_json(path)
    is_its = isinstance(settings, dict) and settings.get("num_layers") == layers
    if is_its and settings.get("vace_layers", released) != released:
        raise CheckpointError(
            f"{file}: vace_layers are {settings['vace_layers']}; VACE's blocks run next to {released} here, "
            f"as in every release. Pass such a model, or correct the file.",
            path,
        )


def _count_blocks(shapes: Mapping[str, tuple[int, ...]], blocks: str) -> int:
    count = 0
    for name in shapes:
        match = re.match(rf"{blocks}\.(\d+)\.", name)
        if match is not None:
            count = max(count, 1 + int(match[1]))
    return count


def _join_model_names(header: DitHeader[WanConfig]) -> str:
    names = _list_fitting_tasks(header)
    both = len({TASKS[name].version for name in names}) > 1
    return " or ".join(names) + (" (their files have the same tensors)" if both else "")


def _list_fitting_tasks(header: DitHeader[WanConfig]) -> list[str]:
    """Return the tasks that a transformer file fits; those of its width, if there are any."""
    # Bernini's tasks fit all files of text to video, but a file that is not named so is not Bernini's
    tasks = [
        task
        for task in TASKS.values()
        if task.model_kind == header.config.kind and task.frames > 1 and task.kind != BERNINI
    ]
    sized = [task for task in tasks if task.dim == header.config.dim]
    return [task.name for task in sized or tasks]


def _describe_difference(config: WanConfig, task: WanTask) -> str:
    """Describe the first difference between a file's dimensions and those of a task's released model."""
    if config.in_dim != task.in_dim:
        return f"patch_embedding.weight takes {config.in_dim} input channels, {task.name} has {task.in_dim}."
    if (config.kind == VACE) != (task.kind == VACE):
        blocks = f"The file has {config.vace_layers or 'no'} blocks of VACE, {task.name} has "
        return blocks + ("them; a file of their own is given to --vace." if task.kind == VACE else "none.")
    has_image = task.model_kind in INPUT_CHANNELS[True] or task.kind == "flf2v"
    if config.has_image != has_image:
        return (
            f"img_emb, the projection of image features, is {'present' if config.has_image else 'missing'}; "
            f"{task.name} has {'one' if has_image else 'none'}."
        )
    # the only other difference: models with a first and a last image have position embeddings
    if config.image_positions:
        return f"img_emb.emb_pos has positions for two images, {task.name} is conditioned on one."
    return f"img_emb.emb_pos, by which {task.name} distinguishes two images, is missing."


def make_dit(config: WanConfig, *settings: Any) -> WanModel:
    """Build an empty transformer; with VACE's second stack of blocks if the config has one."""
    if config.kind != VACE:
        return WanModel(config, *settings)
    from wan.vace_model import WanVaceModel  # only for VACE

    return WanVaceModel(config, *settings)


FORMAT = DitFormat(_read_header, lambda header: KIND_WORDS[header.config.kind], make_dit, _make_sources)
# loading takes rope and precision of `WanModel` too
read_dit_header, load_dit = (
    FORMAT.read_header,
    FORMAT.load,
)
