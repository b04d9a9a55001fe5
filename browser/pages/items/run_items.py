"""The items of a run: what its list says of each, its media file, its caption and its losses."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from browser.core.short_names import short_digest
from browser.folders.captions import CaptionText
from browser.folders.datasets import Datasets, FoundDataset, list_named_paths
from browser.folders.folder_files import find_caption_file, list_names
from browser.folders.offered_folders import read_tables
from browser.runs.runs import RunSummary
from modules.pages.language import join, say
from modules.text_files import read_content
from training.reports.item_losses import ItemDraw, compare_items, read_draws, read_images
from training.reports.item_turns import (
    ASIDE,
    BACK,
    CAPTION,
    REQUESTED,
    RESTS,
    ItemChange,
    asked_path,
    read_changes,
    read_items,
)
from training.reports.sections import turns_path

# options that let a run change the turns of its items; only --watch_items obeys requests
OPTIONS = ("rest_learned", "set_aside_noisy", "watch_items")
MAX_CAPTION_BYTES = 1 << 16
MAX_POINTS = 60  # losses in a line, the last ones
DRAWN, SELDOM, SET_ASIDE = "drawn", "seldom", "aside"  # states
STATE_BY_CHANGE = {BACK: DRAWN, RESTS: SELDOM, ASIDE: SET_ASIDE}
STATE_WORDS = {DRAWN: say("drawn"), SELDOM: say("drawn seldom"), SET_ASIDE: say("set aside")}
REQUEST_WORDS = {
    ASIDE: say("asked to be set aside"),
    BACK: say("asked to be taken back"),
    CAPTION: say("asked for another caption"),
}


@dataclass
class RunItem:
    """An item that a run learns, as the page of the run shows it."""

    key: str  # name of its latent cache, which requests name
    stem: str  # of its media file
    state: str = DRAWN
    change: ItemChange | None = None  # the last one of its turns
    caption: str = ""
    is_recaptioned: bool = False
    path: Path | None = None  # media file, if it is below the folders
    thumbnail: Markup | None = None  # that the run has stored, if there is no file
    draws: list[ItemDraw] = field(default_factory=list)  # recorded losses
    hardness: float | None = None
    asked: str = ""  # request that the run has not obeyed yet: ASIDE, BACK or CAPTION

    @property
    def id(self) -> str:
        """Short digest of the key; identifies the item in URLs."""
        return short_digest(self.key)

    @property
    def name(self) -> str:
        """Name of the media file, or else the key."""
        return self.key if self.path is None else self.path.name

    @property
    def state_words(self) -> str:
        """The state with the step and the reason of the last change, and a request that waits."""
        words = [STATE_WORDS[self.state]]
        if self.change is not None:
            words[0] = say(
                "%(state)s since step %(step)s: %(reason)s",
                state=words[0],
                step=f"{self.change.step:,}",
                reason=say("by request") if self.change.reason == REQUESTED else self.change.reason,
            )
        if self.is_recaptioned:
            words.append(say("with a new caption"))
        if self.asked:
            words.append(REQUEST_WORDS[self.asked])
        return join(" · ", words)

    @property
    def loss_words(self) -> str:
        """How its losses compare with those of others; "" if none were recorded."""
        if self.hardness is None:
            return ""
        return say(
            "loss %(hardness)s times that of others, learned %(n)s times",
            hardness=f"{self.hardness:.2f}",
            n=f"{len(self.draws):,}",
        )

    @property
    def spark(self) -> str:
        """Points of a line of its last losses, an SVG polyline in an area 100 wide and 24 high."""
        losses = [draw.loss for draw in self.draws[-MAX_POINTS:]]
        if len(losses) < 2:
            return ""
        lowest, span = min(losses), max(losses) - min(losses) or 1
        width = 100 / (len(losses) - 1)
        points = [(index * width, 23 - 22 * (loss - lowest) / span) for index, loss in enumerate(losses)]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def changes_turns(run: RunSummary) -> bool:
    """Return whether a run may draw its items in other turns, so that its page lists them."""
    return run.start is not None and any(name in OPTIONS for name, _ in run.start.changed)


def obeys_requests(run: RunSummary) -> bool:
    """Return whether a run looks for requests about its items."""
    return run.start is not None and any(name == "watch_items" for name, _ in run.start.changed)


def list_items(datasets: Datasets, run: RunSummary) -> list[RunItem]:
    """Return the items of a run: first those that changed or have a request, then the hardest, then by name.

    Args:
        datasets: Datasets below the roots, among which is that of the run.
        run: The run.
    """
    folder = run.history.parent
    path = turns_path(folder, run.name)
    items = {key: RunItem(key, stem) for key, stem in read_items(path).items()}
    for change in read_changes(path):
        item = items.setdefault(change.key, RunItem(change.key, change.key))
        if change.change == CAPTION:
            item.caption, item.is_recaptioned = change.reason, True
        else:
            item.state, item.change = STATE_BY_CHANGE.get(change.change, DRAWN), change
    by_name: dict[str, list[RunItem]] = {}
    for item in items.values():
        by_name.setdefault(item.stem, []).append(item)
        by_name.setdefault(item.key, []).append(item)
    for word, name in read_asked(asked_path(folder, run.name)):
        for item in by_name.get(name, ()):
            item.asked = word
    _add_media(items.values(), datasets, run)
    _add_losses(items, folder, run.name)
    return sorted(items.values(), key=_get_place)


def _get_place(item: RunItem) -> tuple[bool, float, str]:
    is_unchanged = item.change is None and not (item.is_recaptioned or item.asked)
    return is_unchanged, -(item.hardness or 0.0), item.key


def read_asked(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the word and the name of each request that a run has not obeyed yet."""
    text = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = read_content(path).decode()
    for line in text.splitlines():
        word, _, name = line.strip().partition(" ")
        if word == CAPTION:
            name = name.partition(": ")[0]
        if word in REQUEST_WORDS:
            yield word, name.strip()


def _add_losses(items: Mapping[str, RunItem], folder: Path, name: str) -> None:
    """Add the recorded losses and stored thumbnails of a run to its items."""
    draws = read_draws(folder, name)
    for draw in draws:
        if draw.key in items:
            items[draw.key].draws.append(draw)
    for compared in compare_items(draws):
        if compared.key in items:
            items[compared.key].hardness = compared.hardness
    for key, image in read_images(folder, name).items():
        if key in items:
            items[key].thumbnail = image.tag


def _add_media(items: Iterable[RunItem], datasets: Datasets, run: RunSummary) -> None:
    """Add the media file and the caption of each item, if its dataset is below the folders."""
    ids_and_names = (run.id, run.name)
    dataset = next((one for one in datasets.list_all() if ids_and_names in one.runs), None)
    if dataset is None:
        return
    media = _find_media(datasets, dataset)
    suffixes = _read_caption_suffixes(dataset)
    for item in items:
        item.path = media.get(item.stem)
        if item.path is not None and not item.is_recaptioned:
            item.caption = _read_caption(item.path, suffixes)


def _find_media(datasets: Datasets, dataset: FoundDataset) -> dict[str, Path]:
    """Return the media files in a dataset's folders by stem, as far as they may be shown."""
    media: dict[str, Path] = {}
    with contextlib.suppress(OSError, ValueError):
        for folder in list_named_paths(dataset.path, dataset.base_folder, with_companions=False):
            if folder.is_dir() and datasets.may_show(dataset, folder):
                for name in list_names(folder):
                    media.setdefault(Path(name).stem, folder / name)
    return media


def _read_caption_suffixes(dataset: FoundDataset) -> list[str]:
    """Return the suffixes of caption files that the tables of a dataset name."""
    suffixes = [table.get("caption_extension") for table in read_tables(dataset.path)]
    return [suffix for suffix in dict.fromkeys(suffixes) if isinstance(suffix, str) and suffix[:1] == "."]


def _read_caption(path: Path, suffixes: Sequence[str]) -> str:
    """Return the caption in the file next to a media file; "" without one. Links are not followed."""
    named = [path.with_suffix(suffix) for suffix in suffixes]
    for caption_file in (*named, find_caption_file(path.parent, path.name)):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if caption_file.is_file() and not caption_file.is_symlink():
                return CaptionText.parse(read_content(caption_file, MAX_CAPTION_BYTES)).text
    return ""


def find_shown(items: Sequence[RunItem], words: str) -> list[RunItem]:
    """Return the items whose name or caption contains all words of a search."""
    terms = words.lower().split()
    return [item for item in items if all(term in f"{item.name}\n{item.caption}".lower() for term in terms)]


def describe_shown(items: Sequence[RunItem], num_shown: int) -> str:
    """Return how many items there are in each state."""
    counts = [
        say("%(n)s %(state)s", n=f"{sum(item.state == state for item in items):,}", state=words)
        for state, words in STATE_WORDS.items()
    ]
    if num_shown < len(items):
        counts.append(say("only the first %(n)s are shown", n=f"{num_shown:,}"))
    return join(", ", counts)
