"""Run networks on images of any size: pad by mirroring, blend tiles, use less memory if it runs out.

A network here is a function from B C H W to B C' fH fW; H and W must be multiples of its step. It may
compute in half precision, with float32 where that is not enough.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modules.compile_options import Compilation
from modules.devices import free_memory, is_out_of_memory, replace_slow_float16, select_compute_dtype
from modules.errors import CheckpointError, MemoryPlanError
from modules.integers import ceil_div, round_up
from postprocessing.options import ToolNetworkOptions
from runtime.compile import check_compilation, compile_each
from runtime.planning.device_memory import free_host_memory, spare_bytes

logger = logging.getLogger(__name__)

Run = Callable[[Tensor], Tensor]

WHOLE_IMAGE = 0  # size of a tile that means the whole image
MIN_TILE_SIDE = 64  # smallest tile in pixels; smaller ones would mostly consist of overlap
HOST_MEMORY_FRACTION = (
    0.8  # fraction of the host's free memory to use; the system kills programs that take too much
)


def pad_to_multiple(images: Tensor, step: int, repeats_edge: bool) -> Tensor:
    """Pad images, B C H W, on the right and bottom with their reflection, to multiples of `step`.

    The reflection is repeated for images smaller than `step`.

    Args:
        images: Images, B C H W.
        step: Number that the sides become multiples of.
        repeats_edge: Whether the reflection starts with the last row and column itself.
    """
    for axis in (-2, -1):
        size = images.shape[axis]
        indices = mirrored(size, round_up(size, step), repeats_edge)
        if len(indices) > size:
            images = images.index_select(axis, indices.to(images.device))
    return images


def mirrored(size: int, length: int, repeats_edge: bool) -> Tensor:
    """Return the source index for each of `length` positions of a row that is reflected at its ends."""
    period = 2 * size if repeats_edge else max(2 * size - 2, 1)
    rising = torch.arange(length) % period
    falling = period - rising - (1 if repeats_edge else 0)
    return torch.where(rising < size, rising, falling)


def split_into_tiles(length: int, tile: int, overlap: int, step: int = 1) -> list[tuple[int, int]]:
    """Split a length into the smallest number of equal tiles; return their (start, end).

    Tiles cover 0..length and overlap by at least `overlap`. They are as small as their number allows,
    because overlaps are computed twice. All numbers are multiples of `step` if `length` is; `overlap` is
    rounded up to a multiple.

    Args:
        length: Length to cover.
        tile: Largest size of a tile, more than `overlap`.
        overlap: Smallest overlap.
        step: Number that all positions are multiples of.
    """
    overlap = round_up(overlap, step)
    tile = max(tile // step * step, overlap + step)
    if length <= tile:
        return [(0, length)]
    num_tiles = ceil_div(length - overlap, tile - overlap)
    # n tiles cover n * size - (n - 1) * overlap
    size = round_up(ceil_div(length + (num_tiles - 1) * overlap, num_tiles), step)
    last = length - size  # start of the last tile, which ends at `length`
    starts = [index * last // (num_tiles - 1) // step * step for index in range(num_tiles - 1)]
    return [(start, start + size) for start in [*starts, last]]


def run_in_tiles(run: Run, images: Tensor, tile: int, overlap: int, step: int = 1, factor: int = 1) -> Tensor:
    """Apply `run` to overlapping tiles of images, and blend the results linearly where tiles overlap.

    Where overlapping tiles agree, the result is bit-identical to them.

    Args:
        run: Function to apply.
        images: Images, B C H W, with H and W multiples of `step`.
        tile: Largest side of a tile in pixels of `images`; WHOLE_IMAGE for no tiles.
        overlap: Smallest overlap of neighboring tiles in pixels of `images`.
        step: Number that the positions and sides of tiles are multiples of.
        factor: Scale of the results.
    """
    if tile == WHOLE_IMAGE:
        return run(images)
    height, width = images.shape[-2:]
    rows = split_into_tiles(height, tile, overlap, step)
    columns = split_into_tiles(width, tile, overlap, step)
    if len(rows) == len(columns) == 1:
        return run(images)
    # join the tiles of a row to a strip, and the strips to the result
    result = _TileJoiner(height * factor, axis=-2)
    for top, bottom in rows:
        strip = _TileJoiner(width * factor, axis=-1)
        for left, right in columns:
            strip.add(run(images[..., top:bottom, left:right]), start=left * factor)
        result.add(strip.joined(), start=top * factor)
    return result.joined()


class _TileJoiner:
    """Joins overlapping tiles along one axis, in order, into a tensor that the first tile allocates."""

    def __init__(self, length: int, axis: int) -> None:
        self._length = length  # size of the result along the axis
        self._axis = axis
        self._result: Tensor | None = None
        self._end = 0  # position up to which the result is filled

    def add(self, tile: Tensor, start: int) -> None:
        """Copy a tile into the result at `start`, and blend it with the previous tile where they overlap."""
        axis = self._axis
        end = start + tile.shape[axis]
        if self._result is None:
            if end == self._length:  # a single tile is the result
                self._result, self._end = tile, end
                return
            shape = list(tile.shape)
            shape[axis] = self._length
            self._result, self._end = tile.new_empty(shape), start
        overlap = self._end - start
        if overlap > 0:
            _fade_in(tile.narrow(axis, 0, overlap), self._result.narrow(axis, start, overlap), axis)
        num_new = end - self._end
        self._result.narrow(axis, self._end, num_new).copy_(tile.narrow(axis, overlap, num_new))
        self._end = end

    def joined(self) -> Tensor:
        """Return the joined tensor; at least one tile must have been added."""
        assert self._result is not None
        return self._result


def _fade_in(tile: Tensor, overlap: Tensor, axis: int) -> None:
    """Blend the start of a tile into the overlapping part of the result, in place."""
    length = tile.shape[axis]
    shape = [1] * tile.dim()
    shape[axis] = length
    weight = ((torch.arange(length, dtype=torch.float32) + 0.5) / length).to(tile.device, tile.dtype)
    # interpolated, not a weighted sum: equal values stay exactly equal
    overlap.lerp_(tile, weight.view(shape))


def get_usable_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes, minus a safety margin; None if unknown."""
    if device.type == "cuda":
        return spare_bytes(device)
    room = free_host_memory() if device.type == "cpu" else None
    return None if room is None else round(HOST_MEMORY_FRACTION * room)


def min_tile(step: int, overlap: int) -> int:
    """Return the smallest side of a tile: twice the overlap, rounded up to a multiple of `step`."""
    return round_up(max(MIN_TILE_SIDE, 2 * overlap), step)


def short_reason(error: BaseException) -> str:
    """Return the first sentence of an error's message; without a message, the error's type."""
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__


@dataclass
class MemoryFittedRunner:
    """Runs networks on batches that fit into memory, and remembers their size for the next images of a clip.

    If memory runs out, batches are halved; after that, if `is_auto`, images are cut into smaller and smaller
    tiles.
    """

    device: torch.device
    batch: int  # images at once
    tile: int  # side in pixels of the network's input; WHOLE_IMAGE: no tiles
    is_auto: bool  # whether tiles may become smaller
    overlap: int
    step: int = 1
    factor: int = 1

    def __call__(self, run: Run, images: Tensor, finish: Run = lambda result: result) -> Tensor:
        """Run a network on images in batches or tiles that fit into memory, then apply `finish`.

        Raises MemoryPlanError if nothing fits.

        Args:
            run: The network.
            images: Images, B C H W, with H and W multiples of `step`.
            finish: Applied to untiled results of one or more images.
        """
        while True:
            try:
                results = [
                    finish(
                        run_in_tiles(run, batch, self.tile, self.overlap, step=self.step, factor=self.factor)
                    )
                    for batch in images.split(self.batch)
                ]
                return results[0] if len(results) == 1 else torch.cat(results)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = short_reason(error)
            # outside of `except`, where the error would keep the failed run's tensors alive; then try again
            # After an out-of-memory error, halve the batch, or else the tiles, or raise MemoryPlanError
            # `images` is the batch that failed, `reason` the message of its error.
            batch_size = min(self.batch, len(images))
            longest = max(images.shape[-2:])
            side = longest if self.tile == WHOLE_IMAGE else min(self.tile, longest)
            minimum = min_tile(self.step, self.overlap)
            if batch_size > 1:
                self.batch = batch_size // 2
                logger.info("Out of memory: the batch size is now %d.", self.batch)
            elif self.is_auto and side > minimum:
                self.tile = max(round_up(side // 2, self.step), minimum)
                logger.info("Out of memory: images are now split into tiles of %d pixels.", self.tile)
            else:
                raise MemoryPlanError(
                    f"the device does not have enough memory even for {side} x {side} pixels ({reason}).\n"
                    "  Use a smaller --tile, --dtype fp16 or bf16, or close other programs that use the "
                    "device."
                )
            free_memory(self.device)


def network_dtype(options: ToolNetworkOptions, device: torch.device, what: str) -> torch.dtype:
    """Return the dtype in which a network computes on a device.

    float16 becomes float32 on a CPU.

    Args:
        options: Options of the run.
        device: Device of the run.
        what: Name of the network, for the log.

    Raises:
        OptionError: If the dtype is unknown or fp8.
    """
    return replace_slow_float16(device, select_compute_dtype(options.dtype, "--dtype", torch.float32), what)


class Float32Fallback:
    """A network with float32 inputs and outputs that may compute in half precision.

    Images of a batch whose result in half precision is NaN or infinite are computed again in float32.
    """

    def __init__(self, run: Run, dtype: torch.dtype, load_float32: Callable[[], Run], what: str) -> None:
        """Wrap a loaded network.

        Args:
            run: The network in `dtype`.
            dtype: Dtype in which it computes.
            load_float32: Loads the network in float32; called at the first result that is not finite.
            what: Name of the network, for messages.
        """
        self._run = run
        self.dtype = dtype
        self._load_float32 = load_float32
        self._float32_run: Run | None = None
        self.what = what

    def __call__(self, images: Tensor) -> Tensor:
        """Run the network on images, B C H W float32, again in float32 where results are not finite.

        Raises:
            CheckpointError: If results are not finite in float32 either.
        """
        result = self._run(images.to(self.dtype)).float()
        if self.dtype == torch.float32:
            return result
        is_finite = result.isfinite().flatten(1).all(dim=1)
        if bool(is_finite.all()):
            return result
        if self._float32_run is None:
            logger.info(
                "A result of %s in %s is not finite: such images are computed again in float32.",
                self.what,
                str(self.dtype).removeprefix("torch."),
            )
            self._float32_run = self._load_float32()
        not_finite = (~is_finite).nonzero().flatten()
        float32_result = self._float32_run(images[not_finite]).float()
        if not bool(float32_result.isfinite().all()):
            raise CheckpointError(
                f"the result of {self.what} is NaN or infinite, in float32 too: its file may be damaged. "
                "Download or copy it again."
            )
        result[not_finite] = float32_result
        return result


DEFAULT = Compilation()


def check_network(options: ToolNetworkOptions, device: torch.device) -> None:
    """Raise OptionError before loading a network if the device does not support --dtype or --compile."""
    select_compute_dtype(options.dtype, "--dtype", torch.float32)
    check_compilation(DEFAULT if options.compile else None, device)


def compile_parts(
    options: ToolNetworkOptions, parts: Iterable[nn.Module], choice: Compilation = DEFAULT
) -> None:
    """Compile the `forward` of network modules in place if --compile is set.

    Compilation happens at the first call. Call `check_network` before.

    Args:
        options: Options of the run.
        parts: Preferably the blocks of a list, which share one compilation, or else the whole network.
        choice: How to compile.
    """
    if not options.compile:
        return
    compile_each(parts, choice)
    logger.info("The network is compiled with %s at its first use, which takes a while.", choice.backend)
