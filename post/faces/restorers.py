"""Load the networks that restore and segment faces, from released files."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from modules.checkpoints.dialects import LoadPlan, load_planned
from modules.checkpoints.opening import Checkpoint, open_checkpoint
from modules.errors import CheckpointError
from modules.seeds import derive_seed
from post.faces.codeformer import CHOOSING, CodeFormer, read_codeformer
from post.faces.gfpgan import Gfpgan, read_gfpgan
from post.faces.options import GFPGAN, FacefixOptions
from post.faces.parsenet import ParseNet, ParseNetConfig, read_parsenet
from post.precision import Guarded, Run, compile_parts, network_dtype

logger = logging.getLogger(__name__)

Config = TypeVar("Config")
Network = TypeVar("Network", bound=nn.Module)
META = torch.device("meta")
LICENCES = {
    GFPGAN: "GFPGAN is under Apache-2.0, but has parts of StyleGAN2 (NVIDIA) and DFDNet (CC BY-NC-SA) that "
    "are for non-commercial use only",
    "codeformer": "CodeFormer is under the S-Lab licence 1.0: for non-commercial use only",
}
PARSENET_LICENCE = "ParseNet's weights are under CC BY-NC-SA: for non-commercial use only"


@dataclass(frozen=True)
class Restorer:
    """Two loaded networks and the size of the faces that they take, in pixels."""

    restore: Run  # B 3 S S of -1..1 -> as many, about -1..1, float32
    parse: Run  # B 3 S S of -1..1 -> scores of parts, B 19 S S
    size: int


def check_restorer(options: FacefixOptions, model: Path, parsenet: Path) -> None:
    """Read the headers of both files. Raises CheckpointError if they do not fit, or not each other."""
    restorer = _load_model(options, model, META, torch.float32)
    size = restorer.config.size
    parts = _load(parsenet, read_parsenet, ParseNet, META, torch.float32, "ParseNet")
    _check_sizes(size, parts.config, model, parsenet)


def load_restorer(options: FacefixOptions, model: Path, parsenet: Path, device: torch.device) -> Restorer:
    """Load both networks in the dtype that --dtype says. Raises CheckpointError as `check_restorer`."""
    network, name = options.network, "GFPGAN" if options.mode == GFPGAN else "CodeFormer"
    dtype = network_dtype(network, device, name)

    def load(kept: torch.dtype) -> Gfpgan | CodeFormer:
        made = _load_model(options, model, device, kept)
        if isinstance(made, Gfpgan) and network.seed is not None:
            seed = derive_seed("noise of faces", network.seed)
            made.draw_noise(torch.Generator().manual_seed(seed))
        return made

    def load_parts(kept: torch.dtype) -> ParseNet:
        return _load(parsenet, read_parsenet, ParseNet, device, kept, "ParseNet")

    if isinstance(restorer := load(dtype), CodeFormer) and network.seed is not None:
        logger.warning("--seed is ignored because CodeFormer draws nothing at random.")
    parts = load_parts(dtype)
    size = restorer.config.size
    _check_sizes(size, parts.config, model, parsenet)
    logger.info("%s; %s.", LICENCES[options.mode], PARSENET_LICENCE)
    compile_parts(network, (restorer, parts))
    return Restorer(
        Guarded(_runner(restorer, options), dtype, lambda: _runner(load(torch.float32), options), name),
        Guarded(parts, dtype, lambda: load_parts(torch.float32), "ParseNet"),
        size,
    )


def _runner(network: Gfpgan | CodeFormer, options: FacefixOptions) -> Run:
    """Return a function of faces alone."""

    def run(faces: Tensor) -> Tensor:
        made: Tensor = network(faces) if isinstance(network, Gfpgan) else network(faces, options.weight)
        return made

    return run


def _load_model(
    options: FacefixOptions, path: Path, device: torch.device, dtype: torch.dtype
) -> Gfpgan | CodeFormer:
    if options.mode == GFPGAN:
        return _load(path, read_gfpgan, Gfpgan, device, dtype, "--model")
    return _load(path, read_codeformer, CodeFormer, device, dtype, "--model", kept=CHOOSING)


def _load(
    path: Path,
    read: Callable[[Checkpoint], LoadPlan[Config]],
    build: Callable[[Config], Network],
    device: torch.device,
    dtype: torch.dtype,
    what: str,
    kept: tuple[str, ...] = (),
) -> Network:
    """Load one network. kept: beginnings of names of weights that stay in float32."""

    def dtype_of(name: str, _stored: torch.dtype) -> torch.dtype:
        return torch.float32 if kept and name.startswith(kept) else dtype

    with open_checkpoint(path) as checkpoint:
        return load_planned(read(checkpoint), build, device, dtype_of, what)


def _check_sizes(size: int, config: ParseNetConfig, model: Path, parsenet: Path) -> None:
    # the mirrored edges of its smallest features need two of them
    if size % config.stride or size < 2 * config.stride:
        raise CheckpointError(
            f"{parsenet} and {model} do not go together: the first takes faces of a multiple of "
            f"{config.stride} pixels, from {2 * config.stride} on, the second makes faces of {size}. Give "
            "the released files.",
            parsenet,
        )
