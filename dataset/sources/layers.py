"""Images with layers (`multiple_target`): find the layers of each image by their names, and read them."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetConfig, DatasetTable
from modules.errors import DatasetError, MediaError
from modules.media.buckets import Size
from modules.media.reading import Frame, add_alpha, read_image
from modules.option_values import format_shape

Layers = Mapping[Path, tuple[Path, ...]]  # layers of each full image, from back to front


def check_layers(config: DatasetConfig, has_layers: bool, model: str) -> None:
    """Raise DatasetError if a model is trained on layers but a table has none, or vice versa.

    `has_layers` says whether the model's latents have layers. `model` is for messages.
    """
    errors = []
    for table in config.datasets:
        if table.source.multiple_target and not has_layers:
            errors.append(
                f"{table.name}: multiple_target = true: {model} does not learn layers. Omit it, or "
                "train Qwen-Image with --model_version layered"
            )
        elif has_layers and not table.source.multiple_target:
            errors.append(
                f"{table.name}: {model} learns images with their layers. Set multiple_target = true in the "
                "table, and give each image cat.png its layers cat_1.png, cat_2.png, ... from back to front"
            )
        elif has_layers and table.references.control_directory is not None:
            # without this message, missing control images would be reported
            errors.append(
                f"{table.name}: control_directory: {model} takes no control images, because it splits the "
                "image itself into layers. Omit it"
            )
    if errors:
        raise DatasetError("\n".join(errors))


def group_layers(paths: Sequence[Path], extension: str | None) -> Layers:
    """Return the full images among a folder's images, each with its layers in the order of their numbers.

    A layer of cat.png is named cat_1.png and, unlike a full image of that name, has no caption file.
    `extension` is the suffix of caption files.
    """
    stems = {path.stem for path in paths}
    layers = {path for path in paths if _is_numbered(path, stems) and not _has_caption(path, extension)}
    layers_by_stem: dict[str, list[Path]] = {path.stem: [] for path in paths if path not in layers}
    for layer in layers:
        image_stem = layer.stem.rpartition("_")[0]
        if image_stem in layers_by_stem:
            layers_by_stem[image_stem].append(layer)
        else:  # a layer of a layer, cat_1_1.png: as a full image, it is reported to have no layers
            layers_by_stem.setdefault(layer.stem, [])
    grouped = {}
    for path in paths:
        if path.stem in layers_by_stem:
            grouped[path] = tuple(sorted(layers_by_stem[path.stem], key=_get_layer_number))
    return grouped


def _is_numbered(path: Path, stems: Collection[str]) -> bool:
    """Return whether a file has the name of a layer: one of the stems, followed by a number."""
    image_stem, _, number = path.stem.rpartition("_")
    return image_stem in stems and number.isdecimal()


def _has_caption(path: Path, extension: str | None) -> bool:
    """Return whether an image has a caption of its own, so that it is not a layer."""
    return extension is not None and path.with_name(f"{path.stem}{extension}").is_file()


def _get_layer_number(layer: Path) -> int:
    """Return the number that ends a layer's file name."""
    return int(layer.stem.rpartition("_")[2])


def find_layer_errors(table: DatasetTable, sources: Iterable[MediaSource]) -> list[Fault]:
    """Return an error for each image without layers, and for layers with the same number.

    In a folder, the layers of cat.png are called cat_1.png, cat_2.png, ... A list names them in columns.
    """
    errors = []
    kind = f"problems with the layers of {table.name}"
    for source in sources:
        stems = [layer.stem for layer in source.layers]
        if not stems:
            example = f"{source.stem}_1.png" if table.source.directory else "image_path_1"
            text = f"{source.path}: it has no layers, such as {example}"
            if table.source.directory and source.stem.rpartition("_")[2].isdecimal():  # named like a layer
                text += (
                    ". It is not a layer itself: it has a caption, or there is no image without its number"
                )
            errors.append(Fault(kind, text, source.stem))
        elif table.source.directory and len(set(stems)) < len(stems):  # such as cat_1.png and cat_1.webp
            doubled = next(stem for stem in stems if stems.count(stem) > 1)
            errors.append(Fault(kind, f"{source.path}: two files are named {doubled}. Keep one", source.stem))
    return errors


def read_layers(source: MediaSource, size: Size, fit_image: Callable[[Frame], Frame]) -> list[Frame]:
    """Read the layers of an image, each H W 4 uint8, resized and cropped like the image.

    Args:
        source: The image, with local files.
        size: Original width and height of the image.
        fit_image: Resizes and crops like the image.

    Raises:
        MediaError: If a layer cannot be read, has a different size, or hides others because it is opaque.
    """
    frames: list[Frame] = []
    for path in source.layers:
        frame = add_alpha(read_image(path, alpha=True))
        layer_size = frame.shape[1], frame.shape[0]
        if layer_size != size:
            raise MediaError(
                f"{path} has {format_shape(layer_size)} pixels, but its image, {source.path}, has "
                f"{format_shape(size)}: an image and its layers must have the same size"
            )
        if frames and frame[..., 3].min() == 255:  # the first layer is the background, which may be opaque
            raise MediaError(
                f"{path} is opaque, so it hides the layers below it. Save it as PNG with alpha, and "
                "number layers from back to front"
            )
        frames.append(fit_image(frame))
    return frames
