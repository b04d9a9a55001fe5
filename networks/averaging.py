"""Average the saved files of a finished run: a moving average whose width is chosen afterwards.

Source: Karras et al. 2023, arXiv 2312.02696, section 3 and appendix C.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.finite import check_finite
from checkpoints.opening import Checkpoint, open_checkpoint
from checkpoints.writing import save_tensors, stream_tensors
from modules.command import quote_command
from modules.console import list_some
from modules.errors import CheckpointError, OptionError
from modules.options import Options, option
from modules.output_files import check_output_file, reject_replacing
from modules.paths import explain_missing, sort_by_numbers
from networks.metadata import STALE, add_hashes, find_lora_expert
from networks.names.layouts import COMFYUI, DIFFUSERS, KNOWN, LORA_FORMAT
from networks.use_options import require_files

logger = getLogger(__name__)

LARGEST_HASHED = 4 << 30  # bytes; hashes precede the data in a file, so hashed files are built in memory
NOTE = "ss_post_hoc_ema"
_TARGETS = {KNOWN: "default", COMFYUI: "comfyui", DIFFUSERS: "diffusers"}  # of convert_lora.py
# sigma_rel at which all files have equal weight; Karras et al. 2023, arXiv 2312.02696, eq. 123 at gamma = 0
LARGEST_SIGMA = 12**-0.5


class AveragingOptions(Options):
    """Options of `lora_post_hoc_ema.py`."""

    path: tuple[Path, ...] = option(
        "saved files of one run, from any of its epochs or steps", positional=True, nargs="+"
    )
    no_sort: bool = option(
        "keep the given order of the files; by default they are sorted by their step, or by modification "
        "time if they do not contain it"
    )
    beta: float = option(
        "weight of the average so far when a further file is added; the first file keeps a large share",
        default=0.95,
        minimum=0,
        maximum=1,
        hint="such as 0.9",
    )
    beta2: float | None = option(
        "the same for the last file; the weight changes linearly from --beta to this value",
        minimum=0,
        maximum=1,
        hint="such as 0.9",
    )
    sigma_rel: float | None = option(
        "instead of --beta: width of the average as a fraction of the run, 0.05 to 0.28 (power function)",
        above=0,
        maximum=LARGEST_SIGMA,
        hint="there all files count alike; 0.2 is a good start",
    )
    output_file: Path = option("safetensors file to write", required=True)

    def __post_init__(self) -> None:
        files = self.files()
        if len(files) < 2:
            raise OptionError(f"{files[0]} is a single file: use two or more of one run")
        require_files("path", files, folder_advice="its files end in .safetensors")
        reject_replacing("--output_file", self.output_file, files)
        check_output_file("--output_file", self.output_file)

    def files(self) -> list[Path]:
        """Return each file once; expands patterns such as `x-*.safetensors`, because not all shells do."""
        files: dict[Path, None] = {}
        for path in self.path:
            if path.exists():
                files[path] = None
                continue
            matching = sort_by_numbers(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            if not matching:
                raise OptionError(
                    f"{path}: no such file.{explain_missing(path)} Use files that a training has saved"
                )
            files |= dict.fromkeys(matching)
        return list(files)


def average_files(options: AveragingOptions) -> None:
    """Write the weighted average of the files, with the dtypes and metadata of the last file.

    Sums are computed in float64. Alphas and integer tensors are not averaged and must be equal. The result is
    kept in memory to add hashes; above `LARGEST_HASHED`, it is written tensor by tensor without hashes.

    Raises:
        CheckpointError: If the files belong to different networks or contain NaN or infinite values.
    """
    output = options.output_file
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path)) for path in options.files()]
        if not options.no_sort:
            _sort_by_step(opened)
        files = _select_files(opened)
        weights = compute_file_weights(len(files), options)
        for file, weight in zip(files, weights, strict=True):
            logger.info("%6.2f %%  %s", 100 * weight, file.path)
        last = files[-1]
        metadata = {key: value for key, value in last.metadata.items() if not key.startswith(STALE)}
        metadata[NOTE] = _make_note(files, weights, options)
        average_tensor = _make_averaging(files, weights)
        size_bytes = sum(info.size_bytes for info in last.tensors.values())
        if size_bytes > LARGEST_HASHED:
            stream_tensors(output, last.tensors, average_tensor, metadata)
        else:
            tensors = {name: average_tensor(name) for name in last.tensors}
            save_tensors(output, tensors, add_hashes(tensors, metadata))
    logger.info("%s: the average of %d files", output, len(files))


def _sort_by_step(files: list[Checkpoint]) -> None:
    """Sort files by the step in their metadata, or all by modification time if one of them lacks a step."""
    steps = {file.path: file.metadata.get("ss_steps", "") for file in files}
    # a number of 19 digits or more is not a step of a training run
    if all(step.isdecimal() and len(step) < 19 for step in steps.values()):
        files.sort(key=lambda file: (int(steps[file.path]), file.path.name))
    else:
        logger.info("Some files lack a step in their metadata, so all are sorted by modification time.")
        files.sort(key=lambda file: (file.path.stat().st_mtime_ns, file.path.name))


def _make_note(files: Sequence[Checkpoint], weights: Sequence[float], options: AveragingOptions) -> str:
    """Return the decay settings and each file's weight in the average as JSON, for the metadata."""
    note: dict[str, object] = {"sigma_rel": options.sigma_rel}
    if options.sigma_rel is None:
        note = {"beta": options.beta, "beta2": options.beta2}
    note["files"] = {file.path.name: round(weight, 6) for file, weight in zip(files, weights, strict=True)}
    return json.dumps(note, ensure_ascii=False)


def compute_file_weights(count: int, options: AveragingOptions) -> list[float]:
    """Return the weight of each of `count` files in the moving average; the weights sum to 1.

    For each file k from 2 on, the average so far is multiplied by a decay, and the file by 1 - decay. The
    decay goes from --beta to --beta2; with --sigma_rel it is (1 - 1/k)^(gamma + 1).
    """
    weights = [1.0]
    for decay in _list_decays(count, options):
        weights = [*(weight * decay for weight in weights), 1 - decay]
    return weights


def _list_decays(count: int, options: AveragingOptions) -> list[float]:
    """Return the decay of the average so far at each of the files 2 to `count`."""
    files = range(2, count + 1)
    if options.sigma_rel is not None:
        power = find_gamma(options.sigma_rel) + 1
        return [float((1 - 1 / k) ** power) for k in files]
    last_beta = options.beta if options.beta2 is None else options.beta2
    difference = last_beta - options.beta
    num_steps = max(count - 2, 1)  # 1 for two files, to avoid a division by 0
    return [options.beta + difference * (k - 2) / num_steps for k in files]


def find_gamma(sigma_rel: float) -> float:
    """Return the gamma >= 0 for which t^gamma has the standard deviation `sigma_rel` on 0..1, by bisection.

    Inverts sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), which decreases with gamma.
    """
    low = 0.0
    high = 1.0

    def is_too_wide(gamma: float) -> bool:
        width = float((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))
        return width > sigma_rel

    while is_too_wide(high):  # find a range that contains the solution
        low = high
        high = 2 * high
    # more halvings than a double has mantissa bits
    for _ in range(100):
        middle = (low + high) / 2
        if is_too_wide(middle):
            low = middle
        else:
            high = middle
    return low


def _select_files(files: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the files without duplicates, and without averages (EMA) if there are other files."""
    selected = _without_copies(files)
    if len(selected) < 2:
        raise CheckpointError(f"{selected[0].path} is the only file left: use at least two of the same run")
    if len({file.metadata.get("ss_session_id") for file in selected}) > 1:
        logger.warning("The files are from different runs; an average of those rarely makes sense.")
    first = selected[0]
    is_network = any("." in name for name in first.tensors)  # names in a latent cache have no dots
    if not is_network:
        raise CheckpointError(
            f"{first.path} does not contain a network: it has {list_some(list(first.tensors), 3)}.\n"
            "  Pass the saved LoRAs or models of the same run.",
            first.path,
        )
    _reject_several_experts(selected)
    for file in selected[1:]:
        _reject_other_network(file, first)
    return selected


def _without_copies(files: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the files without duplicates, and without averages (EMA) if there are other files; log both."""
    selected: list[Checkpoint] = []
    has_plain_files = any("ss_ema_decay" not in file.metadata for file in files)
    path_by_hash: dict[str, Path] = {}  # hash of the tensors -> the first file with it
    for file in files:
        is_ema = "ss_ema_decay" in file.metadata
        model_hash = file.metadata.get("sshs_model_hash", "")  # "" never counts as a duplicate
        if is_ema and has_plain_files:
            logger.warning("%s is left out: it is already an average (EMA).", file.path)
        elif model_hash and model_hash in path_by_hash:
            logger.warning(
                "%s is left out: it contains the same tensors as %s.", file.path, path_by_hash[model_hash]
            )
        else:
            path_by_hash[model_hash] = file.path
            selected.append(file)
    return selected


def _reject_several_experts(files: Sequence[Checkpoint]) -> None:
    """Raise CheckpointError if the LoRA files were trained for different experts."""
    experts: dict[Path, str] = {}
    for file in files:
        expert = find_lora_expert(file.metadata, file.path)
        if expert is not None:
            experts[file.path] = expert.replace("_", " ")
    if len(set(experts.values())) > 1:
        listed = ", ".join(f"{path} ({expert})" for path, expert in experts.items())
        raise CheckpointError(
            f"The files are LoRAs of different experts: {listed}.\n  Use files of one expert."
        )


def _reject_other_network(file: Checkpoint, first: Checkpoint) -> None:
    """Raise CheckpointError if a file's tensor names or shapes differ from the first file's."""
    names_in_only_one = sorted(first.tensors.keys() ^ file.tensors.keys())
    different_shapes: list[str] = []
    for name, info in file.tensors.items():
        if name in first.tensors and info.shape != first.tensors[name].shape:
            different_shapes.append(f"{name} {list(info.shape)} and {list(first.tensors[name].shape)}")
    if names_in_only_one:
        difference = f"only one has {list_some(names_in_only_one, 3)}"
    elif different_shapes:
        difference = f"sizes differ: {list_some(different_shapes, 3)}"
    else:
        return
    raise CheckpointError(
        f"{file.path} contains a different network than {first.path}: {difference}.\n  "
        f"{_advise(file, first)}",
        file.path,
    )


def _advise(file: Checkpoint, first: Checkpoint) -> str:
    """Return advice on a LoRA file whose tensor names or shapes differ from the first file's."""
    file_format = file.metadata.get(LORA_FORMAT, KNOWN)
    first_format = first.metadata.get(LORA_FORMAT, KNOWN)
    if file_format == first_format or first_format not in _TARGETS:
        return "Use files of one run, with equal ranks."
    output = file.path.with_name(f"{file.path.stem}_{first_format}.safetensors")
    arguments = ["--input", str(file.path), "--output", str(output), "--target", _TARGETS[first_format]]
    command = quote_command(["python", "convert_lora.py", *arguments])
    return f"They were saved with other names (--lora_format). Convert it: {command}"


def _make_averaging(files: Sequence[Checkpoint], weights: Sequence[float]) -> Callable[[str], Tensor]:
    """Return a function that averages a tensor over all files, in the last file's dtype."""

    def average_tensor(name: str) -> Tensor:
        last = files[-1].read(name)
        is_alpha = name.rpartition(".")[2] == "alpha"
        if is_alpha or not last.is_floating_point():
            for file in files[:-1]:
                # in float64, so that files of different dtypes can be compared
                if not torch.equal(file.read(name).double(), last.double()):
                    raise CheckpointError(
                        f"{name} differs between {file.path} and {files[-1].path}.\n"
                        "  Use files of the same run, with equal alphas.",
                        file.path,
                    )
            return last
        total = torch.zeros(last.shape, dtype=torch.float64)
        for file, weight in zip(files, weights, strict=True):
            tensor = last if file is files[-1] else file.read(name)
            check_finite(file.path, name, tensor)
            total.add_(tensor.double(), alpha=weight)
        return total.to(last.dtype)

    return average_tensor
