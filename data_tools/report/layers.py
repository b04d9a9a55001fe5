"""Read the layers of images as caching would, so that mismatched layers are reported before caching."""

from collections.abc import Iterator, Sequence

from dataset.caching.planning import SourcePlan
from dataset.caching.prefetch import Failure, map_ahead
from dataset.sources.layers import read_layers
from modules.bars import Bar
from modules.errors import MediaError
from modules.media.reading import Frame, image_size


def find_unusable_layers(plans: Sequence[SourcePlan], workers: int) -> Iterator[Failure]:
    """Yield a failure for each image whose layers cannot be read, differ in size or hide others.

    Images with valid caches are skipped, because caching has read them; remote images are not downloaded.
    """
    read = [
        plan
        for plan in plans
        if plan.source.layers and plan.missing_spans and not plan.source.remote_or_packed
    ]
    bar = Bar(len(read), "Reading layers", "image")
    for failure in map_ahead(read, _read_layers, workers, bar):
        if failure is not None:
            yield failure


def _read_layers(plan: SourcePlan) -> Failure | None:
    """Read all layers of an image; return a failure if they cannot be used."""
    try:
        read_layers(plan.source, image_size(plan.source.path), fit_image=_keep_corner)
    except MediaError as error:
        return Failure.of(plan.source, error)
    return None


def _keep_corner(frame: Frame) -> Frame:
    """Return one pixel of a layer, because the check only needs to know whether the layer can be read."""
    return frame[:1, :1]
