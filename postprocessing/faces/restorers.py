"""Find and load the networks that restore and segment faces, from released files."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from checkpoints.dialects import LoadPlan, count, load_planned, make_shape_reader, make_wrong_kind_error
from checkpoints.opening import SUFFIXES, Checkpoint, list_tensor_sources, open_checkpoint
from modules.command import quote_command
from modules.errors import CheckpointError
from modules.option_values import to_path
from modules.paths import explain_missing
from modules.seeds import derive_seed
from postprocessing.contract import batch_norm
from postprocessing.faces.codeformer import CODE_PREDICTION_PREFIXES, CodeFormer, read_codeformer
from postprocessing.faces.gfpgan import Gfpgan, read_gfpgan
from postprocessing.options import GFPGAN, RETINAFACES, YUNET, FacefixOptions
from postprocessing.tiling import Float32Fallback, Run, compile_parts, network_dtype

logger = logging.getLogger(__name__)


# ParseNet: segment the parts of a face, so that clothes and background stay unchanged.
#
# Source: Chen et al. 2021 (PSFRGAN), arXiv 2009.08709, as published with facexlib.
# Letters: B faces, C channels, h w height and width

CLASSES = 19
# in the order of CelebAMask-HQ: skin, nose, glasses, eyes, brows, ears, mouth, lips, hair; 15 is ear rings.
# Background, hat, necklace, neck and clothes stay unchanged.
FACE_CLASSES = (*range(1, 14), 15)
RELEASED_FILES = "parsing_parsenet.pth"
UNUSED = ("out_img_conv.*", "*.num_batches_tracked")  # tensors that are only used in training


@dataclass(frozen=True)
class ParseNetConfig:
    """Channel counts of ParseNet's encoder and decoder."""

    down: tuple[int, ...]  # channels before and after each halving
    blocks: int  # number of blocks at the smallest size
    up: tuple[int, ...]  # channels before and after each doubling

    @property
    def stride(self) -> int:
        """Number of pixels per position of the coarsest feature map."""
        return 1 << (len(self.down) - 1)


class ConvLayer(nn.Module):
    """3 x 3 convolution with reflection padding, without bias if a normalization follows."""

    def __init__(self, width_in: int, width: int, has_norm: bool, stride: int = 1) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(
            width_in, width, 3, stride, padding=1, padding_mode="reflect", bias=not has_norm
        )
        self.norm = nn.ModuleDict()  # one deeper, as in the files
        if has_norm:
            self.norm["norm"] = batch_norm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, then normalize if the layer has a norm."""
        x = self.conv2d(x)
        for norm in self.norm.values():
            x = norm(x)
        return x


class ParsingBlock(nn.Module):
    """Residual block of ParseNet; `scale` 0.5, 1 or 2 resizes height and width."""

    def __init__(self, width_in: int, width: int, scale: float) -> None:
        super().__init__()
        stride = 2 if scale < 1 else 1
        self.conv1 = ConvLayer(width_in, width, has_norm=True)
        self.conv2 = ConvLayer(width, width, has_norm=True, stride=stride)
        self.shortcut_func = None if scale == 1 else ConvLayer(width_in, width, has_norm=False, stride=stride)
        self.doubles = scale > 1

    def forward(self, x: Tensor) -> Tensor:
        """Return features at the scaled size, B C H W."""
        if self.doubles:
            x = interpolate(x, scale_factor=2, mode="nearest")
        straight = x if self.shortcut_func is None else self.shortcut_func(x)
        return straight + self.conv2(leaky_relu(self.conv1(x), 0.2))


class ParseNet(nn.Module):
    """Face segmentation network: a score for each part of a face at each pixel."""

    def __init__(self, config: ParseNetConfig) -> None:
        super().__init__()
        deepest = config.down[-1]
        self.config = config
        self.encoder = nn.Sequential(
            ConvLayer(3, config.down[0], has_norm=False),
            *(ParsingBlock(a, b, 0.5) for a, b in pairwise(config.down)),
        )
        self.body = nn.Sequential(*(ParsingBlock(deepest, deepest, 1) for _ in range(config.blocks)))
        self.decoder = nn.Sequential(*(ParsingBlock(a, b, 2) for a, b in pairwise(config.up)))
        self.out_mask_conv = ConvLayer(config.up[-1], CLASSES, has_norm=False)

    def forward(self, faces: Tensor) -> Tensor:
        """Return class scores of each pixel, B 19 h w float32.

        Args:
            faces: Faces, B 3 h w, -1..1, with sides that are multiples of the stride.
        """
        x = self.encoder(faces.to(self.out_mask_conv.conv2d.weight.dtype))
        return self.out_mask_conv(self.decoder(x + self.body(x))).float()


def face_parts(scores: Tensor) -> Tensor:
    """Return the face mask, B h w bool, from ParseNet's class scores, B 19 h w."""
    is_face = torch.zeros(CLASSES, dtype=torch.bool, device=scores.device)
    is_face[list(FACE_CLASSES)] = True
    return is_face[scores.argmax(dim=1)]


def read_parsenet(checkpoint: Checkpoint) -> LoadPlan[ParseNetConfig]:
    """Plan the loading of a ParseNet; the layer sizes are read from tensor shapes.

    Raises:
        CheckpointError: If the file is not a ParseNet file.
    """
    wrong_kind_error = make_wrong_kind_error(
        checkpoint, f"a ParseNet of {CLASSES} parts", "the folder of --model", RELEASED_FILES
    )
    if "out_mask_conv.conv2d.weight" not in checkpoint.tensors:
        raise wrong_kind_error
    sources = list_tensor_sources(checkpoint)
    shape = make_shape_reader(checkpoint, sources, wrong_kind_error)

    def out_channels(name: str) -> int:
        return shape(f"{name}.conv2d.weight")[0]

    # encoder.0 is a plain convolution; the others are residual blocks
    num_down = count(sources, r"encoder\.\d+") - 1
    num_up = count(sources, r"decoder\.\d+")
    down = [out_channels("encoder.0")]
    down += [out_channels(f"encoder.{index}.conv1") for index in range(1, num_down + 1)]
    up = [down[-1]]
    up += [out_channels(f"decoder.{index}.conv1") for index in range(num_up)]
    if num_down != num_up or out_channels("out_mask_conv") != CLASSES:
        raise wrong_kind_error
    config = ParseNetConfig(tuple(down), count(sources, r"body\.\d+"), tuple(up))
    return LoadPlan(config, checkpoint, sources, ignore=UNUSED)


Config = TypeVar("Config")
Network = TypeVar("Network", bound=nn.Module)
LICENSES = {
    GFPGAN: "GFPGAN is under Apache-2.0, but has parts of StyleGAN2 (NVIDIA) and DFDNet (CC BY-NC-SA) that "
    "are for non-commercial use only",
    "codeformer": "CodeFormer is under the S-Lab license 1.0: for non-commercial use only",
}
PARSENET_LICENSE = "ParseNet's weights are under CC BY-NC-SA: for non-commercial use only"


@dataclass(frozen=True)
class Restorer:
    """The face restoration network and ParseNet, with the size in pixels of the faces they take."""

    restore: Run  # B 3 S S of -1..1 -> B 3 S S of about -1..1, float32
    parse: Run  # B 3 S S of -1..1 -> scores of parts, B 19 S S
    size: int


def load_networks(
    options: FacefixOptions, model: Path, parsenet: Path, device: torch.device, dtype: torch.dtype
) -> tuple[Gfpgan | CodeFormer, ParseNet]:
    """Load the network that restores faces, and ParseNet, which finds the parts of a face.

    Raises:
        CheckpointError: If a file is not valid, or if the sizes of the networks do not match.
    """
    restorer = _load_model(options, model, device, dtype)
    face_parser = _load_parsenet(parsenet, device, dtype)
    size, stride = restorer.config.size, face_parser.config.stride
    # reflection padding needs at least two features on a side
    if size % stride or size < 2 * stride:
        raise CheckpointError(
            f"{parsenet} and {model} do not fit together: the first requires faces whose size is a multiple "
            f"of {stride} "
            f"pixels, from {2 * stride} on, the second produces faces of {size}. Use the released files.",
            parsenet,
        )
    return restorer, face_parser


def load_restorer(options: FacefixOptions, model: Path, parsenet: Path, device: torch.device) -> Restorer:
    """Load the face restoration network, and ParseNet, which finds the mask of a face.

    Raises:
        CheckpointError: If a file is missing or of another kind.
    """
    network_options = options.network
    name = "GFPGAN" if options.mode == GFPGAN else "CodeFormer"
    dtype = network_dtype(network_options, device, name)

    # used instead if results in `dtype` are not finite
    def load_float32_restorer() -> Run:
        return _configure(_load_model(options, model, device, torch.float32), options)

    def load_float32_parsenet() -> ParseNet:
        return _load_parsenet(parsenet, device, torch.float32)

    restorer, face_parser = load_networks(options, model, parsenet, device=device, dtype=dtype)
    if isinstance(restorer, CodeFormer) and network_options.seed is not None:
        logger.warning("--seed is ignored because CodeFormer uses no random numbers.")
    logger.info("%s; %s.", LICENSES[options.mode], PARSENET_LICENSE)
    compile_parts(network_options, (restorer, face_parser))
    return Restorer(
        restore=Float32Fallback(_configure(restorer, options), dtype, load_float32_restorer, name),
        parse=Float32Fallback(face_parser, dtype, load_float32_parsenet, "ParseNet"),
        size=restorer.config.size,
    )


def _configure(network: Gfpgan | CodeFormer, options: FacefixOptions) -> Run:
    """Return the function that restores faces, with CodeFormer's fidelity or GFPGAN's noise (if seeded)."""
    if isinstance(network, CodeFormer):
        return lambda faces: network(faces, options.weight)
    seed = options.network.seed
    if seed is not None:
        network.draw_noise(torch.Generator().manual_seed(derive_seed("noise of faces", seed)))
    return network


def _load_model(
    options: FacefixOptions, path: Path, device: torch.device, dtype: torch.dtype
) -> Gfpgan | CodeFormer:
    if options.mode == GFPGAN:
        return _load(path, read_gfpgan, Gfpgan, device=device, dtype=dtype, what="--model")
    return _load(
        path,
        read_codeformer,
        CodeFormer,
        device=device,
        dtype=dtype,
        what="--model",
        float32_prefixes=CODE_PREDICTION_PREFIXES,
    )


def _load_parsenet(path: Path, device: torch.device, dtype: torch.dtype) -> ParseNet:
    return _load(path, read_parsenet, ParseNet, device=device, dtype=dtype, what="ParseNet")


def _load(
    path: Path,
    make_plan: Callable[[Checkpoint], LoadPlan[Config]],
    build: Callable[[Config], Network],
    device: torch.device,
    dtype: torch.dtype,
    what: str,
    float32_prefixes: tuple[str, ...] = (),
) -> Network:
    """Load the weights of a checkpoint into the network that `build` creates from the plan's config."""
    # Weights are converted to `dtype`, except those whose names start with one of the `float32_prefixes`:
    # these are loaded in float32. `what` names the network in messages.

    def select_tensor_dtype(name: str, _stored: torch.dtype) -> torch.dtype:
        return torch.float32 if name.startswith(float32_prefixes) else dtype

    with open_checkpoint(path) as checkpoint:
        return load_planned(
            make_plan(checkpoint), build, device=device, dtype=select_tensor_dtype, label=what
        )


# Find the files for restoring faces: the model, and next to it the detector and ParseNet.
# names without suffix; the first existing file is used
MODELS = {
    GFPGAN: ("GFPGANv1.4", "GFPGANv1.3", "GFPGANCleanv1-NoCE-C2"),
    "codeformer": ("codeformer", "codeformer-v0.1.0"),
}
PARSENET = "parsing_parsenet"
ORIGINS = {
    GFPGAN: "the releases of github.com/TencentARC/GFPGAN",
    "codeformer": "the releases of github.com/sczhou/CodeFormer",
    PARSENET: "the releases of github.com/xinntao/facexlib",
    YUNET: "github.com/opencv/opencv_zoo, in models/face_detection_yunet",
    **dict.fromkeys(RETINAFACES.values(), "the releases of github.com/xinntao/facexlib"),
}


class FacefixFiles(NamedTuple):
    """Paths of the model files for face restoration."""

    model: Path
    parsenet: Path
    detector: Path


def find_files(options: FacefixOptions) -> FacefixFiles:
    """Return the paths of the restoration model, ParseNet and the face detector.

    --model is the model or its folder; the other files are next to it, unless --detection_model is a path.

    Raises:
        CheckpointError: If a file is missing.
    """
    mode = options.mode
    model = options.network.model
    if model.is_dir():
        model = _find_first_file(model, MODELS[mode], "--model", origin=ORIGINS[mode], task=mode)
    elif not model.exists():
        raise CheckpointError(
            f"--model {model}: there is no such file or folder.{explain_missing(model)}", model
        )
    detector = _find_detector(options.detection_model, model.parent, mode)
    what = "ParseNet, which finds the parts of a face"
    parsenet = _find_first_file(model.parent, (PARSENET,), what, origin=ORIGINS[PARSENET], task=mode)
    return FacefixFiles(model, parsenet, detector)


def _find_detector(name: str, folder: Path, mode: str) -> Path:
    """Return the model file of a face detector."""
    what = f"--detection_model {name}"
    if name in RETINAFACES:
        stem = RETINAFACES[name]
        is_default = stem == next(iter(RETINAFACES.values()))
        task = mode if is_default else None  # tools/download.py offers only the default one
        return _find_first_file(folder, (stem,), what, origin=ORIGINS[stem], task=task)
    if name == YUNET:
        onnx_files = [path for path in sorted(folder.glob("*.onnx")) if "yunet" in path.name.lower()]
        if not onnx_files:
            file = ".onnx file with yunet in its name"
            raise _make_missing_error(what, file, folder, origin=ORIGINS[YUNET], task=YUNET)
        return onnx_files[-1]  # the newest: their names end with a date
    path = to_path("--detection_model", name)
    if not path.exists():
        raise CheckpointError(
            f"{what}: there is no such file.{explain_missing(path)} Pass the path of one, or one of "
            f"{', '.join([*RETINAFACES, YUNET])}.",
            path,
        )
    return path


def _find_first_file(folder: Path, stems: Sequence[str], what: str, origin: str, task: str | None) -> Path:
    """Return the first existing file with one of the stems and any known suffix, ignoring case."""
    path_by_name: dict[str, Path] = {}
    with contextlib.suppress(OSError):  # the folder may be missing
        path_by_name = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_file()}
    for stem in stems:
        for suffix in SUFFIXES:
            if f"{stem}{suffix}".lower() in path_by_name:
                return path_by_name[f"{stem}{suffix}".lower()]
    raise _make_missing_error(what, f"{stems[0]}.pth", folder, origin=origin, task=task)


def _make_missing_error(what: str, file: str, folder: Path, origin: str, task: str | None) -> CheckpointError:
    """Return the error for a missing model file; `task` is its task in tools/download.py, if any."""
    command = quote_command(["python", "tools/download.py", "--family", "tools", "--task", task or ""])
    download = "" if task is None else f"download it with {command}, or "
    return CheckpointError(
        f"{what}: no {file} is in {folder}.\n  Pass another file or folder, or put it there: {download}take "
        f"it from {origin}.",
        folder,
    )
