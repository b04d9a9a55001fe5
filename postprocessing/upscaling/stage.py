"""The stage that upscales images."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from modules.devices import GIB
from modules.integers import round_up
from modules.layers.convolution import memory_formats
from modules.media.encoding import OutputFrame, Pixels
from postprocessing import tiling
from postprocessing.contract import Clip, Stage, enlarged_clip, to_pixels, to_tensor
from postprocessing.options import UpscalerOptions
from postprocessing.upscaling.files import META, Config, Upscaler, UpscalerKind, check_file, load_upscaler
from runtime.planning.dry_run import ACCELERATOR, allocate_empty_weights, dry_run, find_peak_phase

logger = logging.getLogger(__name__)


PROBE_SIDES = (32, 64)  # side of the test images
# float32 values per pixel of a result: its colors, and their copies while resizing
VALUES_PER_RESULT_PIXEL = 3 + 3 * 2


@lru_cache(maxsize=16)
def bytes_per_pixel(kind: UpscalerKind, config: Config, dtype: torch.dtype) -> float:
    """Measure the bytes that upscaling takes per pixel of the input, without the weights.

    All blocks of a network take equal memory, so only one block of each kind is run.
    """
    small, large = (round_up(side, config.step) for side in PROBE_SIDES)
    small_peak = _measure_peak_bytes(kind, config, dtype, small)
    large_peak = _measure_peak_bytes(kind, config, dtype, large)
    # the difference of two sizes leaves out what does not grow with the image
    return (large_peak - small_peak) / (large**2 - small**2)


def _measure_peak_bytes(kind: UpscalerKind, config: Config, dtype: torch.dtype, side: int) -> int:
    """Return the peak memory of a network with one block for a square image, without computing anything."""
    # The network runs on fake tensors, and a ledger adds up their sizes.
    with META:
        network = kind.build(config.with_one_block).to(dtype)
    with dry_run() as ledger, torch.no_grad():
        allocate_empty_weights(network, ledger)
        images = torch.empty(1, 3, side, side, dtype=dtype, device=ACCELERATOR)
        network(images.contiguous(memory_format=torch.channels_last))
    _, bytes_by_kind = find_peak_phase(ledger.peaks)
    return sum(bytes_by_kind.values())


def result_bytes(config: Config, width: int, height: int) -> int:
    """Return the device memory for one upscaled float32 image, including its conversion to integers."""
    return 4 * VALUES_PER_RESULT_PIXEL * width * height * config.factor**2


MAX_BYTES_PER_PIXEL = 1 << 16  # bytes per input pixel, more than any released network needs
MAX_BATCH_SIZE = 16  # largest batch that is chosen automatically
BATCH_PIXELS = 1 << 19  # pixels of the input that keep a GPU busy; more would only take memory


def check_upscaler(options: UpscalerOptions) -> None:
    """Read the header of the model file. Raises CheckpointError or OptionError if it is not an upscaler."""
    check_file(options.network.model)


def make_upscaler(options: UpscalerOptions, device: torch.device) -> Stage:
    """Load the upscaler, and wrap it as a stage that cuts large images into tiles.

    Raises:
        CheckpointError: If the file is missing or is not an upscaler.
    """
    path = options.network.model
    dtype = tiling.network_dtype(options.network, device, "the upscaler")
    upscaler = load_upscaler(path, device, dtype)
    name = path.name
    kind = upscaler.kind.name
    factor = upscaler.config.factor
    if upscaler.kind.mode != options.mode:
        logger.info("--mode %s, but %s has a different architecture: %s is used.", options.mode, name, kind)
    # for the log: a network only enlarges by its own factor
    resized = "" if options.scale == factor else f", then resized to --scale {options.scale:g}"
    logger.info("%s: %s, %d times as large%s.", name, kind, factor, resized)
    tiling.compile_parts(options.network, upscaler.network.repeated_blocks)

    # used instead if results in `dtype` are not finite
    def load_float32() -> tiling.Run:
        return load_upscaler(path, device, torch.float32).network

    network = tiling.Float32Fallback(upscaler.network, dtype, load_float32, kind)
    return UpscalerStage(upscaler, network, options, device)


@dataclass(frozen=True)
class UpscalerStage:
    """Stage that upscales each image, resizes it to the requested size, and rounds once."""

    upscaler: Upscaler
    network: tiling.Float32Fallback
    options: UpscalerOptions
    device: torch.device
    get_usable_bytes: Callable[[torch.device], int | None] = tiling.get_usable_bytes
    name: str = "upscaler"

    def plan_output(self, clip: Clip) -> Clip:
        """Return the clip with its new size.

        Raises:
            OptionError: If no file can have this size.
        """
        return enlarged_clip(clip, self.options.scale, "--scale")

    def run(self, frames: Iterator[OutputFrame], clip: Clip) -> Iterator[OutputFrame]:
        """Yield upscaled images; only one batch is in memory at a time."""
        result = self.plan_output(clip)
        size = (result.height, result.width)
        runner = self._make_runner(clip)
        while batch := list(islice(frames, runner.batch)):
            enlarged = self.enlarge([frame.pixels for frame in batch], size, runner)
            for index, frame in enumerate(batch):
                # not bound to a name, which would keep it alive while the next one is made
                yield replace(frame, pixels=to_pixels(enlarged[index : index + 1], clip.is_deep))
            del enlarged, batch, frame

    @torch.no_grad()
    def enlarge(
        self, pixels: list[Pixels], size: tuple[int, int], runner: tiling.MemoryFittedRunner
    ) -> Tensor:
        """Upscale images to (height, width): B 3 H W, about 0..1, on the device."""
        images = torch.cat([to_tensor(image, self.device) for image in pixels])
        height, width = images.shape[-2:]
        factor = self.upscaler.config.factor
        images = tiling.pad_to_multiple(images, self.upscaler.config.step, self.upscaler.kind.repeats_edge)
        images = images.contiguous(memory_format=memory_formats(self.device)[1])

        def finish(enlarged: Tensor) -> Tensor:
            return resize(enlarged[..., : height * factor, : width * factor], size)

        return runner(self.network, images, finish)

    def _make_runner(self, clip: Clip) -> tiling.MemoryFittedRunner:
        """Choose the initial batch size and tile size for a clip."""
        options = self.options
        config = self.upscaler.config
        batch = options.batch_size
        if batch is None:
            # as many images as keep a GPU busy; a CPU gains nothing from a batch
            fits = BATCH_PIXELS // (clip.width * clip.height) if self.device.type != "cpu" else 1
            batch = min(max(fits, 1), MAX_BATCH_SIZE)
        tile = options.tile
        if tile is None:
            tile = self._predict_tile(clip, batch)
        elif tile % config.step:
            multiple = max(tile // config.step, 1) * config.step
            logger.info("--tile %d: tiles of %d, a multiple of %d, are used.", tile, multiple, config.step)
            tile = multiple
        return tiling.MemoryFittedRunner(
            self.device,
            batch,
            tile,
            is_auto=options.tile is None,
            overlap=options.tile_overlap,
            step=config.step,
            factor=config.factor,
        )

    def _predict_tile(self, clip: Clip, batch: int) -> int:
        """Return the size of the largest tiles that fit into memory; WHOLE_IMAGE if whole images do."""
        # The size is estimated instead of tried: on a CPU the system would kill the program, and some GPU
        # drivers would fall back to host memory, which is slower than tiles.
        usable_bytes = self.get_usable_bytes(self.device)
        config = self.upscaler.config
        if usable_bytes is None:  # unknown for this device
            return tiling.WHOLE_IMAGE
        width = round_up(clip.width, config.step)
        height = round_up(clip.height, config.step)
        if batch * width * height * MAX_BYTES_PER_PIXEL <= usable_bytes:  # fits with any network
            return tiling.WHOLE_IMAGE
        per_pixel = batch * bytes_per_pixel(self.upscaler.kind, config, self.network.dtype)
        # the result is always held whole, even if the network runs on tiles
        free = usable_bytes - batch * result_bytes(config, width, height)
        if height * width * per_pixel <= free:
            return tiling.WHOLE_IMAGE
        # a square tile, rounded down to the network's step
        side = int((max(free, 0) / per_pixel) ** 0.5) // config.step * config.step
        tile = max(side, tiling.min_tile(config.step, self.options.tile_overlap))
        logger.info(
            "Images of %d x %d would take about %.1f GiB at once, and %.1f GiB are free: they are split "
            "into tiles of %d pixels.",
            clip.width,
            clip.height,
            width * height * per_pixel / GIB,
            free / GIB,
            tile,
        )
        return tile


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images B 3 H W to (height, width); images of that size are returned unchanged.

    Bicubic with antialiasing in float32, by a PyTorch function that every device supports.
    """
    if tuple(images.shape[-2:]) == size:
        return images
    # values beyond white are invisible, but would spread
    return interpolate(images.clamp(0, 1), size, mode="bicubic", antialias=True)
