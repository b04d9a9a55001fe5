"""Decide how often items are drawn, by their losses at equal noise and by requests of the user."""

import json
import logging
import shutil
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import broadcast_object_list

from dataset.batches.items import TrainingItem
from dataset.cache.store import NewCaption
from dataset.cache_files import read_entry
from dataset.caching.one_caption import write_caption
from dataset.sources.captions import complete_captions
from modules.atomic_write import append_text, write_text
from modules.control_codes import shorten
from modules.errors import CacheError, OptionError, UserError
from modules.open_files import replace_file
from training.features.hooks import HookedModel, PlannedRun, RunFeatures
from training.features.item_turns_options import ItemTurnsOptions, ItemTurnsProgress, is_measured
from training.features.phases import GRADIENTS, STEP
from training.reports.item_turns import (
    ASIDE,
    BACK,
    CAPTION,
    MAX_REQUEST_BYTES,
    REQUESTED,
    RESTS,
    ItemChange,
    asked_path,
    read_requests,
)
from training.reports.sections import captions_folder, requests_path, turns_path

if TYPE_CHECKING:
    from training.training_run import GradientStep, TrainingRun

logger = logging.getLogger(__name__)

SHARE_WHILE_RESTING = 0.25
FLAT = 0.03  # largest change between two rounds, as a share of the loss at the start
NUM_ROUNDS = 3  # rounds that are compared
FALLEN = 0.05  # share by which the loss of most items must have fallen before one counts as noisy
POLL_STEPS = 10  # steps between two looks at the request file with several processes, which then wait
MAX_CAPTION = 200  # characters of a caption in the list and in notes


class Decision(NamedTuple):
    """New share of an item's turns, with the reason."""

    key: str
    share: float
    reason: str


def decide(
    progress: ItemTurnsProgress,
    options: ItemTurnsOptions,
    groups: Mapping[str, tuple[int, ...]],
) -> list[Decision]:
    """Return which items change their turns, by the losses of the last rounds.

    * An item rests if its loss stays flat, `rest_learned` below its start. It comes back if half of that is
      lost.
    * An item is set aside if its loss has not fallen in `NUM_ROUNDS` rounds, but that of most items has.
    * A share of the items keeps all turns, and of each group at least one item.

    Args:
        progress: Losses and turns so far; they are not changed.
        options: The limits.
        groups: Group of each item that may change: only items of a group can stand in for each other.
    """
    turns = dict(progress.item_turns)
    decisions: list[Decision] = []
    ratios: dict[str, list[float]] = {}
    for key in groups:
        start, rounds = progress.item_start_losses.get(key, 0.0), progress.item_round_losses.get(key, [])
        if start > 0 and rounds and key not in progress.items_of_user:
            ratios[key] = [loss / start for loss in rounds]
    share = options.rest_learned
    for key, shares in ratios.items():
        was_resting = turns.get(key, 1.0) == SHARE_WHILE_RESTING
        if share is not None and was_resting and shares[-1] > 1 - share / 2:
            del turns[key]
            decisions.append(Decision(key, 1.0, f"its loss is {shares[-1]:.0%} of that at the start again"))
    wishes = _list_wishes(ratios, turns, options)
    num_free = len(groups) - max(1, round(options.items_floor * len(groups))) - len(turns)
    for wish in wishes:
        if num_free > 0 and can_be_replaced(wish.key, turns, groups):
            turns[wish.key] = wish.share
            decisions.append(wish)
            num_free -= 1
    return decisions


def _list_wishes(
    ratios: Mapping[str, Sequence[float]], turns: Mapping[str, float], options: ItemTurnsOptions
) -> list[Decision]:
    """Return which items should be drawn less: first the noisiest, then those that learned most.

    Args:
        ratios: Losses of each item in the rounds, as fractions of its loss at the start.
        turns: Items that are drawn less already.
        options: The limits.
    """
    share = options.rest_learned
    wishes: list[Decision] = []
    median = statistics.median(shares[-1] for shares in ratios.values()) if ratios else 1.0
    last_rounds = {
        key: shares[-NUM_ROUNDS:]
        for key, shares in sorted(ratios.items())
        if key not in turns and len(shares) >= NUM_ROUNDS
    }
    learned_first = sorted(last_rounds, key=lambda key: last_rounds[key][-1])
    noisy_first = sorted(last_rounds, key=lambda key: -last_rounds[key][-1])
    if options.set_aside_noisy and median <= 1 - FALLEN:
        for key in noisy_first:
            last = last_rounds[key]
            if min(last) >= 1:
                reason = f"its loss is {last[-1]:.0%} of that at the start, and {median:.0%} for most items"
                wishes.append(Decision(key, 0.0, reason))
    if share is not None:
        for key in learned_first:
            last = last_rounds[key]
            if max(last) <= 1 - share and max(last) - min(last) <= FLAT:
                reason = f"its loss stays at {last[-1]:.0%} of that at the start"
                wishes.append(Decision(key, SHARE_WHILE_RESTING, reason))
    return wishes


def can_be_replaced(key: str, turns: Mapping[str, float], groups: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether another item of the same group has all its turns."""
    return any(
        group == groups[key] and other != key and other not in turns for other, group in groups.items()
    )


def list_groups(items: Sequence[TrainingItem]) -> dict[str, tuple[int, ...]]:
    """Return the items that can stand in for each other: by key, the table and all sizes."""
    return {item.key: (item.table.index, *item.group) for item in items if not item.table.learning.is_reg}


@dataclass
class ItemTurns:
    """Change how often the items of a run are drawn."""

    options: ItemTurnsOptions
    groups: dict[str, tuple[int, ...]] = field(default_factory=dict)
    requests: dict[int, list[str]] = field(default_factory=dict)  # lines of request files, by step

    plan: PlannedRun | None = None  # None: the run has not begun
    is_listed: bool = False  # whether the list of this run is written

    def join(self, run: RunFeatures) -> None:
        """Add the functions of the feature to a run."""
        run.on.after_load.append(self.begin)
        run.on.rewind.append(self.return_to)
        run.before(GRADIENTS, self.measure_start)
        run.after(STEP, self.act)

    def begin(self, model: HookedModel) -> None:
        """Take up the turns and requests of a resumed run."""
        plan = self.plan = model.plan
        self.groups = list_groups(plan.training)
        progress = plan.progress.feature_state(ItemTurnsProgress)
        self._apply(plan, progress)
        names = plan.names
        if plan.accelerator.is_main_process:
            path = requests_path(names.folder, names.name)
            self.requests = read_requests(path, plan.progress.session_id)
            if plan.progress.step == 0:  # what is there is of an earlier run, which --overwrite replaces
                self.requests = {}
                path.unlink(missing_ok=True)
                shutil.rmtree(captions_folder(names.folder, names.name), ignore_errors=True)
        if plan.accelerator.num_processes > 1:
            (self.requests,) = broadcast_object_list([self.requests])

    def return_to(self, step: int) -> None:
        """Take up the turns of the state that the run went back to; its step is not needed."""
        assert self.plan is not None  # the run has begun
        progress = self.plan.progress.feature_state(ItemTurnsProgress)
        self._apply(self.plan, progress)
        self._write_list(self.plan, progress)

    def _apply(self, plan: PlannedRun, progress: ItemTurnsProgress) -> None:
        """Let batches have the turns and captions of the progress."""
        plan.order.set_turns(progress.item_turns)
        folder = captions_folder(plan.names.folder, plan.names.name)
        new_captions = plan.sources.stores.new_captions
        new_captions.clear()
        for index, stem, text, file_name in progress.item_captions.values():
            path = folder / file_name if file_name else None
            new_captions[int(index), str(stem)] = NewCaption(str(text), path)

    def measure_start(self, run: "TrainingRun", *_: object) -> None:
        """List and measure all items before the first step."""
        progress = run.progress.feature_state(ItemTurnsProgress)
        if not self.is_listed:  # not earlier: files of an earlier run were still moved away
            self.is_listed = True
            self._write_list(run.plan, progress)
        if is_measured(self.options) and not progress.item_start_losses:
            progress.item_start_losses.update(run.measure_items())

    def act(self, run: "TrainingRun", _: "GradientStep") -> None:
        """Take requests, and measure and decide if it is due. All processes call this after each step."""
        step = run.progress.step + 1
        progress = run.progress.feature_state(ItemTurnsProgress)
        before = (dict(progress.item_turns), dict(progress.item_captions))
        for line in self._take_requests(run, step):
            self._obey(run, progress, step, line)
        if is_measured(self.options) and step % self.options.items_every == 0:
            for key, loss in run.measure_items().items():
                progress.item_start_losses.setdefault(key, loss)  # of a new caption, it begins now
                progress.item_round_losses.setdefault(key, []).append(loss)
                del progress.item_round_losses[key][:-NUM_ROUNDS]
            decisions = decide(progress, self.options, self.groups)
            for decision in decisions:
                _set_share(progress, step, decision)
            if decisions:
                run.note(f"{_count(progress)}: the page lists who and why", step)
        if (progress.item_turns, progress.item_captions) != before:
            self._apply(run.plan, progress)
            run.rereads = True
            self._write_list(run.plan, progress)

    def _take_requests(self, run: "TrainingRun", step: int) -> list[str]:
        """Return the lines to obey after this step: recorded ones, then those of a new file."""
        lines = [*self.requests.get(step, [])]
        if not self.options.watch_items or (run.steps.num_processes > 1 and step % POLL_STEPS):
            return lines
        new_lines: list[str] = []
        if run.is_main:
            new_lines = _take_file(asked_path(run.plan.names.folder, run.plan.names.name))
        if run.steps.num_processes > 1:
            (new_lines,) = broadcast_object_list([new_lines])
        if new_lines and run.is_main:  # recorded, so that a run that is resumed from before obeys them again
            _record(run, step, new_lines)
        if new_lines:
            self.requests.setdefault(step, []).extend(new_lines)
        return [*lines, *new_lines]

    def _obey(self, run: "TrainingRun", progress: ItemTurnsProgress, step: int, line: str) -> None:
        """Carry out a line of a request file, or say why not."""
        word, _, name = line.strip().partition(" ")
        text = ""
        if word == CAPTION:
            name, _, text = name.partition(": ")
        name = name.strip()
        keys = [key for key in _find_items(run.plan.training, name) if key in self.groups]
        if word not in (ASIDE, BACK, CAPTION):
            known = f"{ASIDE} NAME, {BACK} NAME or {CAPTION} NAME: TEXT"
            run.note(f"Request {line.strip()!r}: write {known}", step)
            return
        if not keys:
            run.note(f"Request {line.strip()!r}: no item of this run has the name {name}", step)
            return
        if word == CAPTION:
            self._recaption(run, progress, step, keys, text.strip())
            return
        for key in keys:
            is_back = word == BACK
            if not is_back and not can_be_replaced(key, progress.item_turns, self.groups):
                run.note(f"{key} is not set aside: no other item of its size could take its turns", step)
                continue
            if key not in progress.items_of_user:
                progress.items_of_user.append(key)
            _set_share(progress, step, Decision(key, 1.0 if is_back else 0.0, REQUESTED))
            run.note(f"{key} is {'taken back' if is_back else 'set aside'}, as requested", step)

    def _recaption(
        self, run: "TrainingRun", progress: ItemTurnsProgress, step: int, keys: Sequence[str], text: str
    ) -> None:
        """Give items a new caption, whose outputs are written to a file of their own, or say why not."""
        by_key = {item.key: item for item in run.plan.training}
        for key in keys:
            item = by_key[key]
            table = item.table
            caption = text
            if not table.captions.changes.varies_per_step:  # otherwise training adds the trigger word
                (caption,) = complete_captions([text], table)
            path = captions_folder(run.plan.names.folder, run.plan.names.name)
            path /= f"{step:08d}-{item.caption_path(0).name}"
            error = ""
            if item.cache_info.has_cached_texts:
                error = self._encode(run, item, caption, path)
            if error:
                run.note(f"{key} keeps its caption: {error}", step)
                continue
            file_name = path.name if item.cache_info.has_cached_texts else ""
            progress.item_captions[key] = [table.index, item.source_stem, caption, file_name]
            progress.item_start_losses.pop(key, None)  # they are of the earlier caption
            progress.item_round_losses.pop(key, None)
            progress.item_changes.append([*ItemChange(step, key, CAPTION, shorten(caption, MAX_CAPTION))])
            run.note(f"{key} has the caption {shorten(caption, MAX_CAPTION)!r} from now on", step)

    def _encode(self, run: "TrainingRun", item: TrainingItem, caption: str, path: Path) -> str:
        """Write the text cache of a new caption in the main process; return why it failed, or ""."""
        error = ""
        if run.is_main:
            try:
                if item.table.references.rules is not None:
                    raise OptionError("its text encoder sees the references of the item, too")
                if not _has_caption(path, caption):  # after a resume it may be there already
                    run.reporter.log_pause("encoding a new caption")
                    write_caption(run.family, caption, path, run.device)
            except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as failure:
                error = " ".join(str(failure).split()) or type(failure).__name__
        if run.steps.num_processes > 1:
            (error,) = broadcast_object_list([error])
        return error

    def _write_list(self, plan: PlannedRun, progress: ItemTurnsProgress) -> None:
        """Write the file that lists the items that may change, and which changed when."""
        if not plan.accelerator.is_main_process:
            return
        stems = {item.key: item.source_stem for item in plan.training if item.key in self.groups}
        values = {"session": plan.progress.session_id, "items": stems, "changes": progress.item_changes}
        path = turns_path(plan.names.folder, plan.names.name)
        write_text(path, json.dumps(values, ensure_ascii=False, indent=0) + "\n")


def _has_caption(path: Path, caption: str) -> bool:
    """Return whether a text cache is complete and of this caption."""
    try:
        return read_entry(str(path), False).metadata.get("caption1") == caption
    except CacheError:
        return False


def _set_share(progress: ItemTurnsProgress, step: int, decision: Decision) -> None:
    """Record a decision."""
    if decision.share == 1:
        progress.item_turns.pop(decision.key, None)
    else:
        progress.item_turns[decision.key] = decision.share
    change = {0.0: ASIDE, 1.0: BACK}.get(decision.share, RESTS)
    progress.item_changes.append([*ItemChange(step, decision.key, change, decision.reason)])


def _count(progress: ItemTurnsProgress) -> str:
    """Return how many items rest and are set aside, in words."""
    shares = [*progress.item_turns.values()]
    num_aside = shares.count(0.0)
    return f"Of the items, {len(shares) - num_aside} rest and {num_aside} are set aside"


def _find_items(items: Collection[TrainingItem], name: str) -> list[str]:
    """Return the keys of the items with this key, or whose media file has this name or stem."""
    stem = Path(name).stem if Path(name).suffix else name
    found = {item.key for item in items if name in (item.key, item.source_stem) or stem == item.source_stem}
    return sorted(found)


def _take_file(path: Path) -> list[str]:
    """Return the lines of a request file, and remove it; [] without a file."""
    taken = path.with_name(f"{path.name}.taken")
    try:
        if not path.is_file():
            return []
        replace_file(path, taken)  # first, so that lines that the page adds meanwhile are in a new file
        if taken.stat().st_size > MAX_REQUEST_BYTES:
            logger.warning("%s asks for nothing: it contains more than %d bytes.", path, MAX_REQUEST_BYTES)
            text = ""
        else:
            text = taken.read_text(encoding="utf-8")
        taken.unlink()
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("%s cannot be read and removed, and asks for nothing: %s", path, error)
        return []
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _record(run: "TrainingRun", step: int, lines: Sequence[str]) -> None:
    """Append requests to the file that a resumed run reads."""
    path = requests_path(run.plan.names.folder, run.plan.names.name)
    session_id = run.progress.session_id
    text = "".join(
        json.dumps({"session": session_id, "step": step, "line": line}, ensure_ascii=False) + "\n"
        for line in lines
    )
    append_text(path, text)
