"""`--check`: report what a configuration amounts to, and what is wrong with it, before a long run."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dataset.batches.finding import NO_COMMANDS, CachingCommands, TrainingItem, find_items
from dataset.batches.order import BatchOrder
from dataset.batches.reading import read_batch
from dataset.batches.same_encoders import SameEncoders
from dataset.cache.files import EMPTY
from dataset.caching.caption_files import list_caption_files
from dataset.caching.planning import (
    Caches,
    Recipe,
    SourcePlan,
    complete,
    list_names,
    media_table,
    names_of,
    plan_all,
)
from dataset.caching.reports import Failure
from dataset.caching.source_jobs import decode_ahead, progress
from dataset.caching.texts import plan_text
from dataset.config import DatasetConfig, DatasetTable
from dataset.sources.decoding import decode_source
from dataset.sources.listing import MediaSource, find_sources, missing_captions
from modules.contract.family import Encodes, LatentSpec
from modules.errors import CacheError, DatasetError, OptionError

LISTED = 50  # at most so many lines of one kind


@dataclass(frozen=True)
class CheckResult:
    """Lines to print, and whether nothing is wrong."""

    lines: tuple[str, ...]
    ok: bool

    @property
    def exit_code(self) -> int:
        return 0 if self.ok else 1


@dataclass(frozen=True)
class _Table:
    """Result of comparing one table with its caches."""

    sources: Sequence[MediaSource]
    plans: Sequence[SourcePlan]
    unreadable: Sequence[Failure]

    @property
    def buckets(self) -> Counter[tuple[int, ...]]:
        """Count items by (width, height[, frames])."""
        return Counter(item for plan in self.plans for item in plan.items)


def check_media(family: Caches, config: DatasetConfig, workers: int, skip_existing: bool) -> CheckResult:
    """Report what latent caching would do.

    Sources whose records are missing or outdated are decoded; nothing is encoded or written.
    """
    try:
        encoder, files = (
            dict(family.media_identity),
            [f"{name}: {value}" for name, value in family.media_identity.items()],
        )
    except OptionError as error:
        encoder, files = {}, [f"caches are not compared: {error}"]
    recipe = Recipe(
        family.cache_tag, encoder, family.latent, family.defaults.fps, skip_existing, family.sections_of
    )
    lines, ok = ["Files recognised:", *_indent(files)], True
    batches = 0
    for table in config.datasets:
        sources = find_sources(table)
        try:
            family.check_table(media_table(table, any(source.control for source in sources)))
        except DatasetError as error:
            lines, ok = [*lines, str(error)], False
            continue
        found = _look_at(table, sources, recipe, workers)
        captions = missing_captions(found.sources)
        dropped = [Failure.of(plan.source, plan.reason) for plan in found.plans if plan.reason is not None]
        kept = sum(len(plan.kept) for plan in found.plans)
        to_encode = sum(len(plan.missing or ()) for plan in found.plans)
        lines += [f"{table.name}: {len(found.sources)} {table.kind}s, {found.buckets.total()} items"]
        lines += _indent(_bucket_lines(table, found.buckets))
        masked = sum(source.mask is not None for source in found.sources)
        if masked:
            lines += _indent([f"{masked} of {len(found.sources)} have a mask; the others are learned whole"])
        if encoder:
            lines += _indent([f"caches: {kept} files are valid, {to_encode} items need encoding"])
        batches += _num_batches(table, found.buckets)
        lines += _list_names("give no item", dropped)
        lines += _list_names("cannot be read", found.unreadable)
        lines += _list_names("have no caption", captions)
        ok = ok and not captions and not found.unreadable
    lines += [f"Training on all of it: {batches} batches an epoch, as many steps without accumulation"]
    return CheckResult((*lines, _verdict(ok)), ok)


def check_texts(family: Encodes, config: DatasetConfig, skip_existing: bool) -> CheckResult:
    """Report what text caching would do. No encoder is loaded."""
    encoders = [(encoder, dict(encoder.identity)) for encoder in family.text_encoders()]
    lines, ok = ["Files recognised:"], True
    lines += _indent(
        f"{encoder.name} {key}: {value}" for encoder, identity in encoders for key, value in identity.items()
    )
    for table in config.datasets:
        sources = find_sources(table)
        captions = missing_captions(sources)
        lines += [f"{table.name}: {len(sources)} {table.kind}s"]
        texts = list_caption_files(sources, family.cache_tag)
        plans = [plan_text(text, encoders, skip_existing) for text in texts]
        for encoder, _ in encoders:
            to_do = sum(encoder.name in plan.missing for plan in plans)
            kept = len(plans) - to_do
            lines += _indent([f"caches of {encoder.name}: {kept} are valid, {to_do} captions need encoding"])
        lines += _list_names("have no caption", captions)
        ok = ok and not captions
    return CheckResult((*lines, _verdict(ok)), ok)


def check_training(
    config: DatasetConfig,
    cache_tag: str,
    latent: LatentSpec,
    commands: CachingCommands = NO_COMMANDS,
    accumulation: int = 1,
    processes: int = 1,
    files: Iterable[str] = (),
    text_keys: frozenset[str] = frozenset(),
) -> CheckResult:
    """Report what a training run would see in its caches; every cache file is read and verified.

    accumulation, processes: their product is the number of batches per optimizer step. files: lines about the
    checkpoints that the caller recognised. text_keys: keys of a complete text cache.
    """
    found = find_items(config, cache_tag, latent, text_keys)
    lines, ok = ["Files recognised:", *_indent(files)], True
    encoders = SameEncoders(commands)
    for table in config.datasets:
        items = [item for item in found.items if item.table.index == table.index]
        buckets = Counter(item.bucket for item in items)
        lines += [
            f"{table.name}: {len(items)} cached items" + (", for validation" if table.validation else "")
        ]
        lines += _indent(_bucket_lines(table, buckets))
        absent = (*found.missing_text, *found.missing_empty)
        missing = [path for path in absent if path.parent == table.cache_directory]
        unfinished = [path for path in found.unfinished_text if path.parent == table.cache_directory]
        faults, remarks = _unusable(items, latent, encoders)
        lines += _list_names("text caches are missing", missing)
        lines += _list_names("text caches are unfinished", unfinished)
        lines += _list_names("cannot be used", faults)
        lines += _indent(remarks)
        lines += _source_lines(table, items)
        ok = ok and not missing and not unfinished and not faults and bool(items)
    training = [item for item in found.items if not item.table.validation]
    order = BatchOrder(training, seed=0)
    steps = -(-order.num_batches // (accumulation * processes))
    lines += [
        f"An epoch: {order.num_items} items with repeats, {order.num_batches} batches, {steps} steps"
        f" ({accumulation} accumulated, {processes} processes)"
    ]
    if not ok:
        lines += ["Caches are made by:", *_indent([commands.latents, commands.text])]
    return CheckResult((*lines, _verdict(ok)), ok)


def _look_at(table: DatasetTable, sources: Sequence[MediaSource], recipe: Recipe, workers: int) -> _Table:
    existing = {table.index: list_names(table, recipe.tag)}
    plans, unreadable = plan_all(sources, existing, recipe, workers)

    def decoded(plan: SourcePlan) -> SourcePlan:
        media = decode_source(plan.source, recipe.fps, recipe.latent.pixel_step, recipe.latent.frame_step)
        return complete(plan, media, names_of(existing, plan.source), recipe)

    known = [plan for plan in plans if plan.missing is not None]
    unknown = [plan for plan in plans if plan.missing is None]
    for _, result in decode_ahead(
        unknown, lambda plan: plan.source, decoded, workers, progress(len(unknown), "decoding")
    ):
        if isinstance(result, Failure):
            unreadable.append(result)
        else:
            known.append(result)
    return _Table(sources, known, unreadable)


def _bucket_lines(table: DatasetTable, buckets: Mapping[tuple[int, ...], int]) -> list[str]:
    size = table.batch_size
    lines = []
    for bucket, count in sorted(buckets.items()):
        repeated = count * table.num_repeats
        frames = "" if len(bucket) == 2 else f", {bucket[2]} frames"
        lines.append(
            f"{bucket[0]}x{bucket[1]}{frames}: {count} items x {table.num_repeats}, {-(-repeated // size)} "
            f"batches of {size}"
        )
    return lines


def _num_batches(table: DatasetTable, buckets: Mapping[tuple[int, ...], int]) -> int:
    return sum(-(-count * table.num_repeats // table.batch_size) for count in buckets.values())


def _unusable(
    items: Sequence[TrainingItem], latent: LatentSpec, encoders: SameEncoders
) -> tuple[list[str], list[str]]:
    """Read every item; return why some cannot be trained on, and remarks about the others."""
    faults, remarks = [], []
    drops = [EMPTY] if items and items[0].table.caption_dropout_rate else []
    # each caption, and the empty prompt once
    pairs = [(item, number) for item in items for number in range(item.captions)]
    for item, number in [*pairs, *((item, number) for item in items[:1] for number in drops)]:
        try:
            batch = read_batch([item], latent, encoders.commands, captions=[number])
            said = encoders.difference(batch.made_by)
        except CacheError as error:
            faults.append(str(error).splitlines()[0])
        else:
            remarks += [] if said is None else said.splitlines()
    return faults, remarks


def _source_lines(table: DatasetTable, items: Sequence[TrainingItem]) -> list[str]:
    """List sources without a cache or a caption, if the sources exist: training needs only the caches."""
    try:
        sources = find_sources(table)
    except DatasetError as error:
        return _indent([f"its sources are not checked: {error}"])
    stems = {item.source_stem for item in items}
    uncached = [one.path for one in sources if one.stem not in stems]
    return [
        *_list_names("have no cache: too short, unreadable, or not cached yet", uncached),
        *_list_names("have no caption", missing_captions(sources)),
    ]


def _list_names(what: str, ones: Sequence[object]) -> list[str]:
    """Return lines with a count and at most LISTED of the objects."""
    if not ones:
        return []
    more = [f"... and {len(ones) - LISTED} more"] if len(ones) > LISTED else []
    return _indent([f"{len(ones)} {what}:", *_indent([str(one) for one in ones[:LISTED]]), *more])


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _verdict(ok: bool) -> str:
    return "Nothing is wrong." if ok else "Something is wrong: see above."
