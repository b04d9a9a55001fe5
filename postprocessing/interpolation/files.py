"""Find the files of GIMM-VFI in the folder of --model, and load the networks in them."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from checkpoints.dialects import (
    LoadPlan,
    count,
    load_planned,
    make_shape_reader,
    make_wrong_kind_error,
    rename_sources,
)
from checkpoints.opening import SUFFIXES, Checkpoint, list_tensor_sources, open_checkpoint
from modules.errors import CheckpointError
from modules.limits import MAX_RAFT_ITERATIONS
from modules.paths import explain_missing
from modules.text_files import read_text
from modules.yaml_files import parse_yaml
from postprocessing.interpolation.flowformer import FlowFormer, read_flowformer
from postprocessing.interpolation.layers import CHANNELS
from postprocessing.interpolation.motion import GimmConfig, GimmVfi, MotionConfig
from postprocessing.interpolation.raft import (
    ITERATIONS,
    FlowHead,
    MotionEncoder,
    Raft,
    RaftEncoder,
    SeparableGru,
    read_raft,
)
from postprocessing.interpolation.synthesis import PER_BLEND, RefinementConfig, SynthesisConfig, UpdateConfig
from postprocessing.interpolation.twins import Twins
from postprocessing.options import WITH_FLOWFORMER, WITH_RAFT

FLOW_PREFIX = "flow_estimator."  # the optical flow inside the original files
IGNORED_TENSORS = ("*.num_batches_tracked", "g_filter", f"{FLOW_PREFIX}*")  # g_filter is a constant
PROJECTIONS = ("amt_second_last_cproj", "amt_last_cproj", "amt_fproj")

Shape = Callable[..., tuple[int, ...]]  # of `make_shape_reader`
WeightShape = Callable[[str], tuple[int, ...]]  # name of a convolution -> shape of its weight


def read_gimm(checkpoint: Checkpoint) -> LoadPlan[GimmConfig]:
    """Plan the loading of GIMM-VFI without its optical flow; the layer sizes are read from tensor shapes.

    Raises:
        CheckpointError: If the file is not a GIMM-VFI file.
    """
    checkpoint = checkpoint.without_prefix("module.")
    sources = list_tensor_sources(checkpoint)
    wrong_kind_error = make_wrong_kind_error(
        checkpoint, "GIMM-VFI", "--model", "the folder with gimmvfi_r_arb or gimmvfi_f_arb"
    )
    if not {"hyponet.params_dict.linear_wb0", "amt_init_decoder.convblock.4.weight"} <= sources.keys():
        raise wrong_kind_error
    shape = make_shape_reader(checkpoint, sources, wrong_kind_error)

    def weight_shape(name: str) -> tuple[int, ...]:
        return shape(f"{name}.weight")

    # Read the layer sizes of motion encoder and implicit motion network from the shapes in a file
    layers = count((f"{name}." for name in sources), r"hyponet\.params_dict\.linear_wb\d+")
    widths = tuple(shape(f"hyponet.params_dict.linear_wb{layer}", 2)[1] for layer in range(layers))
    encoder_blocks = count(sources, r"cnn_encoder\.\d+\.layers")
    residual_blocks = count(sources, r"res_conv\.\d+\.layers")
    last = f"cnn_encoder.{encoder_blocks + 4}"
    motion = MotionConfig(
        encoder=(weight_shape("cnn_encoder.0")[0], weight_shape("cnn_encoder.1")[0], weight_shape(last)[0]),
        encoder_blocks=encoder_blocks,
        residual=(weight_shape("res_conv.0")[0], weight_shape("res_conv.1")[0]),
        residual_blocks=residual_blocks,
        layers=widths,
    )
    synthesis = _read_synthesis(sources, weight_shape)
    # sizes that the layers of such a network cannot have
    if (
        synthesis.last.outputs % PER_BLEND
        or synthesis.feature <= 0
        or synthesis.first.inner_channels > synthesis.first.width
        or synthesis.last.inner_channels > synthesis.last.width
        or weight_shape("amt_update4_low.convc1")[1] != 2 * CHANNELS
    ):
        raise wrong_kind_error
    config = GimmConfig(motion, synthesis)
    return LoadPlan(config, checkpoint, rename_sources(sources, _add_module_prefix), IGNORED_TENSORS)


def _add_module_prefix(name: str) -> str:
    """Return a tensor's name in this project, below one of two modules: `synthesis` or `motion`."""
    if name == "g_filter" or name.startswith(FLOW_PREFIX):
        return name
    return f"synthesis.{name}" if name.startswith("amt_") else f"motion.{name}"


def _read_synthesis(names: Container[str], weight_shape: WeightShape) -> SynthesisConfig:
    """Return the sizes of the AMT synthesis, from the shapes of its weights."""
    first = _read_decoder("amt_init_decoder", 1, weight_shape)
    last = _read_decoder("amt_final_decoder", 2, weight_shape)
    projections = []
    # 1x1 convolutions that files for RAFT have, to convert RAFT's feature maps; FlowFormer needs none
    if f"{PROJECTIONS[0]}.weight" in names:
        for name in PROJECTIONS:
            outputs, inputs, *_ = weight_shape(name)
            projections.append((inputs, outputs))
    return SynthesisConfig(
        projections=tuple(projections),
        # channels of the maps at 1/4 and 1/8 of the size. The weights follow pixel shuffles, which
        # divide channels by 4 for each doubling: two doublings from 1/4, one from 1/8
        quarter=16 * weight_shape("amt_final_decoder.upsample.2.0")[1],
        eighth=4 * weight_shape("amt_init_decoder.upsample.1.0")[1],
        first=first,
        last=last,
        low=_read_update("amt_update4_low", weight_shape),
        high=_read_update("amt_update4_high", weight_shape),
        combined_width=weight_shape("amt_comb_block.0")[0],
    )


def _read_decoder(name: str, doublings: int, weight_shape: WeightShape) -> RefinementConfig:
    """Return the sizes of an AMT decoder, which enlarges by 2 ** `doublings`."""
    entry = weight_shape(f"{name}.convblock.0.0")
    return RefinementConfig(
        doublings=doublings,
        first=entry[2],
        upsample=(
            weight_shape(f"{name}.upsample.{doublings}.0")[0],
            weight_shape(f"{name}.upsample.{doublings + 4}.0")[0],
        ),
        width=entry[0],
        inner_channels=weight_shape(f"{name}.convblock.1.conv2.0")[0],
        outputs=weight_shape(f"{name}.convblock.4")[0],
    )


def _read_update(name: str, weight_shape: WeightShape) -> UpdateConfig:
    return UpdateConfig(
        correlation=(weight_shape(f"{name}.convc1")[0], weight_shape(f"{name}.convc2")[0]),
        flow=(weight_shape(f"{name}.convf1")[0], weight_shape(f"{name}.convf2")[0]),
        motion=weight_shape(f"{name}.conv")[0],
        hidden=weight_shape(f"{name}.gru.0")[0],
    )


MODEL_OPTION = "--model"
RAFT_FILES = ("raft-things_fp32.safetensors", "raft-things.pth")
FLOWFORMER_FILES = ("flowformer_sintel_fp32.safetensors", "flowformer_sintel.pth")
COMPILED = (RaftEncoder, Twins, MotionEncoder, SeparableGru, FlowHead)  # compiled parts of flow networks


@dataclass(frozen=True)
class ModeSettings:
    """Settings from the model's YAML file that tensors do not reveal; defaults fit the released models."""

    coordinates: tuple[float, float] = (-1.0, 1.0)
    frequency: float = 1.0
    output_bias: float = 0.5
    raft_iterations: int = ITERATIONS


DEFAULT = ModeSettings()


class ModeFiles(NamedTuple):
    """Paths of the model files of an interpolation mode."""

    main: Path
    flow: Path  # file of the optical flow; may be the main file
    settings: Path | None  # None: the released settings


def find_files(path: Path, kind: str) -> ModeFiles:
    """Return the paths of an interpolation model's files; `path` is the folder or the main file.

    Raises CheckpointError if a file is missing.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path}: there is no such file or folder.{explain_missing(path)} Pass the folder to "
            f"{MODEL_OPTION}.",
            path,
        )
    folder = path if path.is_dir() else path.parent
    main = _find_main_file(folder, kind) if path.is_dir() else path  # a given file may have any name
    settings = folder / f"{kind}_arb.yaml"
    return ModeFiles(main, _find_flow_file(main, kind), settings if settings.is_file() else None)


def _find_main_file(folder: Path, kind: str) -> Path:
    """Return the interpolation network's file in a folder; raise CheckpointError if there is none."""
    file_names = tuple(
        f"{kind}_arb{perceptual}{ending}"
        # the variant trained with LPIPS is preferred if both are there
        for perceptual in ("_lpips", "")
        for ending in ("_fp32.safetensors", ".safetensors", ".pt", ".pth")
    )
    main = _find_model(folder, file_names, kind)
    if main is None:
        raise CheckpointError(
            f"{folder}: there is no file of {kind} in this folder. Put {file_names[0]} there, or pass "
            f"another folder to {MODEL_OPTION} or another --mode.",
            folder,
        )
    return main


def _find_flow_file(main: Path, kind: str) -> Path:
    """Return the optical flow network's file next to the main file, which may also contain that network."""
    names = RAFT_FILES if kind == WITH_RAFT else FLOWFORMER_FILES
    # stem of the released file; the name of a renamed copy may begin with it
    flow = _find_model(main.parent, names, names[1].partition(".")[0])
    if flow is not None:
        return flow
    if not _holds_flow(main):
        raise CheckpointError(
            f"{main.parent}: the optical flow of {kind} is not next to {main.name}. Put {names[0]} there.",
            main.parent,
        )
    return main


def _holds_flow(main: Path) -> bool:
    with open_checkpoint(main) as checkpoint:
        names = checkpoint.without_prefix("module.").tensors
        return any(name.startswith(FLOW_PREFIX) for name in names)


def _find_model(folder: Path, names: Sequence[str], start: str) -> Path | None:
    """Return the model file with the first existing name of `names`, or the only one starting with `start`.

    Returns None if there is neither. Raises CheckpointError if several begin with `start`.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    models = sorted(
        file
        for file in folder.iterdir()
        if file.suffix in SUFFIXES and file.name.lower().startswith(start) and file.is_file()
    )
    if len(models) > 1:
        listed = ", ".join(file.name for file in models)
        raise CheckpointError(f"{folder}: which of {listed}? Keep one, or name it {names[0]}.", folder)
    return models[0] if models else None


def read_settings(path: Path | None) -> ModeSettings:
    """Read GIMM-VFI's settings from a YAML file of its authors; None gives the defaults of these files.

    Raises:
        CheckpointError: If the file cannot be read or asks for an unsupported computation.
    """
    if path is None:
        return ModeSettings()
    try:
        return _parse_settings(path)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = str(error).strip().splitlines()[0]  # errors of YAML have several lines
        raise CheckpointError(
            f"{path} cannot be used: {reason}. Without it the released settings are used.", path
        ) from error


def _parse_settings(path: Path) -> ModeSettings:
    """Read the settings of a GIMM-VFI model from its YAML file."""
    arch = _require_mapping(_require_mapping(parse_yaml(read_text(path))).get("arch"))
    hyponet = _require_mapping(arch.get("hyponet"))
    activation = hyponet.get("activation", "siren")
    # either a mapping of settings, or only the name of the type
    sine = _require_mapping(activation) or {"type": activation}
    for name, setting, supported in (
        ("fwarp_type", arch.get("fwarp_type", "linear"), "linear"),
        ("activation", sine.get("type", "siren"), "siren"),
        ("normalize_weight", hyponet.get("normalize_weight", True), True),
    ):
        if setting != supported:
            raise CheckpointError(f"{path}: {name} {setting} is not supported, only {supported}.", path)
    low, high = arch.get("coord_range", DEFAULT.coordinates)
    iterations = int(arch.get("raft_iter", DEFAULT.raft_iterations))
    if not 1 <= iterations <= MAX_RAFT_ITERATIONS:
        raise ValueError(f"raft_iter {iterations} is not 1 to {MAX_RAFT_ITERATIONS}")
    return ModeSettings(
        coordinates=(float(low), float(high)),
        frequency=float(sine.get("siren_w0", DEFAULT.frequency)),
        output_bias=float(hyponet.get("output_bias", DEFAULT.output_bias)),
        raft_iterations=iterations,
    )


def _require_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class InterpolationNetworks:
    """The loaded networks of an interpolation mode."""

    gimm: GimmVfi
    estimator: Raft | FlowFormer

    @property
    def parts(self) -> list[nn.Module]:
        """Return the submodules worth compiling: convolutional sequences without lookups or warps."""
        motion = self.gimm.motion
        synthesis = self.gimm.synthesis
        parts: list[nn.Module] = []
        parts += [module for module in self.estimator.modules() if isinstance(module, COMPILED)]
        parts += [motion.cnn_encoder, motion.res_conv, motion.hyponet]
        for decoder in (synthesis.amt_init_decoder, synthesis.amt_final_decoder):
            parts += [decoder.upsample, *decoder.convblock]
        parts += [synthesis.amt_update4_low, synthesis.amt_update4_high, synthesis.amt_comb_block]
        return parts


def load_networks(path: Path, kind: str, device: torch.device, dtype: torch.dtype) -> InterpolationNetworks:
    """Load the interpolation and the optical flow network; only the synthesis computes in `dtype`.

    On the meta device only headers are read.

    Raises:
        CheckpointError: If a file is missing or of the wrong kind, or if the two do not match.
    """
    mode_files = find_files(path, kind)
    settings = read_settings(mode_files.settings)

    def select_tensor_dtype(name: str, _: torch.dtype) -> torch.dtype:
        return dtype if name.startswith("synthesis.") else torch.float32

    with open_checkpoint(mode_files.main) as checkpoint:
        plan = _plan_gimm(checkpoint, kind, settings)
        gimm = load_planned(plan, GimmVfi, device=device, dtype=select_tensor_dtype, label=MODEL_OPTION)
    with open_checkpoint(mode_files.flow) as checkpoint:
        # the main file may contain the optical flow network, with a prefix; its other tensors are left out
        if mode_files.flow == mode_files.main:
            checkpoint = checkpoint.without_prefix("module.").without_prefix(
                FLOW_PREFIX, ignored_prefixes=("",)
            )
        if kind == WITH_RAFT:
            estimator, channels = _load_raft(checkpoint, settings.raft_iterations, device)
        else:
            estimator, channels = _load_flowformer(checkpoint, device)
    # Raise CheckpointError if the synthesis network cannot take the optical flow network's feature maps
    synthesis = plan.config.synthesis
    # projections: (channels in, channels out) of the layers that adapt the feature maps; without them, the
    # maps are used directly
    expected = tuple(channels_in for channels_in, _ in synthesis.projections)
    if not expected:
        expected = (synthesis.quarter, synthesis.eighth, channels.matching)
    if channels != expected:
        raise CheckpointError(
            f"{mode_files.flow} does not fit {mode_files.main.name}: it produces maps of {channels.quarter} "
            f"and {channels.eighth} channels. Pass both files of one release.",
            mode_files.flow,
        )
    return InterpolationNetworks(gimm, estimator)


class _MapChannels(NamedTuple):
    """Channels of the feature maps in an EncodedImage."""

    quarter: int
    eighth: int
    matching: int


def _load_raft(
    checkpoint: Checkpoint, iterations: int, device: torch.device
) -> tuple[Raft | FlowFormer, _MapChannels]:
    plan = read_raft(checkpoint)
    build = partial(Raft, iterations=iterations)
    raft = load_planned(plan, build, device=device, dtype=torch.float32, label=MODEL_OPTION)
    _, quarter, eighth = plan.config.stages
    return raft, _MapChannels(quarter, eighth, plan.config.features)


def _load_flowformer(checkpoint: Checkpoint, device: torch.device) -> tuple[Raft | FlowFormer, _MapChannels]:
    plan = read_flowformer(checkpoint)
    flowformer = load_planned(plan, FlowFormer, device=device, dtype=torch.float32, label=MODEL_OPTION)
    quarter, eighth = plan.config.context
    return flowformer, _MapChannels(quarter.width, eighth.width, plan.config.matching)


def _plan_gimm(checkpoint: Checkpoint, kind: str, settings: ModeSettings) -> LoadPlan[GimmConfig]:
    """Plan the loading of a mode's main file. Raises CheckpointError if it is for the other mode."""
    plan = read_gimm(checkpoint)
    # only files for RAFT have layers that project its features; FlowFormer's are used unchanged
    if bool(plan.config.synthesis.projections) != (kind == WITH_RAFT):
        mode = WITH_FLOWFORMER if kind == WITH_RAFT else WITH_RAFT
        path = checkpoint.path
        raise CheckpointError(f"{path} is a file of {mode}, not of {kind}. Use --mode {mode}.", path)
    motion = replace(
        plan.config.motion,
        coordinates=settings.coordinates,
        frequency=settings.frequency,
        output_bias=settings.output_bias,
    )
    return replace(plan, config=replace(plan.config, motion=motion))
