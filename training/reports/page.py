"""Describe a training on one HTML page: samples, curves, files, memory, next commands and settings."""

import contextlib
import functools
import stat
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.console import format_count, format_size
from modules.pages.charts import Chart, Curve, draw_chart
from modules.pages.language import say, say_count, say_duration
from modules.pages.page import link, write_page
from modules.text_files import read_safetensors_texts
from protocols.rules import AUDIO_STREAM, IMAGE_STREAM
from training.reports.history import SHOWN, Points, RunHistory, Start, find_workflow, history_name
from training.reports.metric_charts import MetricChart, MetricTile, find_uncharted

if TYPE_CHECKING:
    from training.reports.sample_files import LoadClip  # only with samples

Tile = tuple[str, str, str]  # label, value and a note
TEMPLATE = Path(__file__).resolve().parent / "page.html"
MAX_COLUMNS = 10  # columns of the grid of samples
MAX_PROMPTS = 20
SMOOTHING = 0.9
MIN_SMOOTHED = 20  # curves with fewer points are not smoothed
MAX_DOTS = 60  # curves with fewer points may have a dot for each
MAX_BINS = 600  # points of a curve; a drawing has too few pixels to show more


@dataclass(frozen=True)
class Standing:
    """Status of a run shown on its page: start, current step, and how it ended."""

    start: Start
    step: int
    text: str = "running"
    kind: str = ""  # good if it is finished, bad if an error ended it


def write_training_page(
    path: Path,
    history: Path,
    run_history: RunHistory,
    standing: Standing,
    load: "LoadClip | None" = None,
) -> None:
    """Write the page of a run from the content of its history.

    Args:
        path: Path of the file.
        history: File of the run's history.
        run_history: Content of the run's history.
        standing: State of the run: its start, its step, and how it ended.
        load: Reads the clips of samples; None shows no samples.

    Raises:
        OutputError: If the page cannot be written.
    """
    name = history_name(history)
    values = page_values(history.parent, run_history, standing, load=load, name=name)
    write_page(path, TEMPLATE, f"{name}: training", values)


def page_values(
    folder: Path,
    run_history: RunHistory,
    standing: Standing,
    load: "LoadClip | None" = None,
    maximum: tuple[int, int] = (MAX_COLUMNS, MAX_PROMPTS),
    name: str = "",
    has_sections: bool = True,
) -> dict[str, Any]:
    """Return the template variables of a run's page, by name.

    Args:
        folder: Value of --output_dir.
        run_history: Content of the run's history.
        standing: State of the run: its start, its step, and how it ended.
        load: Reads the clips of samples; None shows no samples.
        maximum: Largest number of columns and rows in the grid of samples.
        name: Value of --output_name, whose scores show which file is best.
        has_sections: Whether to show the scores and item losses, which name training images.
    """
    from downloads.catalogue import model_title  # only for pages
    from training.reports.scores import find_best_file, list_score_charts

    best = find_best_file(folder, name, run_history)
    best_name = None if best is None else best.name
    charts = list_charts(run_history)
    if name:
        charts[1:1] = list_score_charts(folder, name, run_history)  # after the loss, which is the first
    return {
        "live": None,  # the page is a file, which the browser interface does not serve and update
        "is_shared": False,  # not a page behind a share link, so samples link to their files
        "standing": standing,
        "model": model_title(standing.start.model),
        "written": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "tiles": list_tiles(standing, run_history),
        "grid": _make_sample_grid(run_history, load, maximum),
        "makes_samples": "sample_prompts" in dict(standing.start.changed),
        "charts": [draw_chart(chart) for chart in charts],
        "sections": _make_sections(folder, name, run_history) if has_sections and name else [],
        "files": _list_saved_files(run_history, folder, best_name),
        "advice": (best and best.reasons) or describe_best(run_history, best_name),
        "notes": [(f"{step:,}", text) for step, text in run_history.notes],
        "memory": run_history.memory,
        "commands": run_history.commands,
    }


def _make_sections(folder: Path, name: str, run_history: RunHistory) -> list[Any]:
    """Return the sections of a page with the scores and item losses of a run, if it has any."""
    from training.reports.item_losses import make_section as make_items
    from training.reports.item_turns import make_section as make_turns
    from training.reports.scores import make_section as make_scores

    sections = [make(folder, name, run_history) for make in (make_scores, make_items)]
    sections.append(make_turns(folder, name))
    return [section for section in sections if section is not None]


def _make_sample_grid(
    run_history: RunHistory, load: "LoadClip | None", maximum: tuple[int, int]
) -> dict[str, Any] | None:
    """Return the grid of samples, at most `maximum` (columns, rows); None if no samples are shown."""
    if load is None:
        return None
    from training.reports.sample_files import make_grid  # only with samples

    max_columns, max_prompts = maximum
    return make_grid(run_history, load, max_columns, max_prompts)


def _draw_losses(run_history: RunHistory, maximum: int) -> Chart:
    """Return the chart of the training loss and the validation loss."""
    curves = make_curves({say("loss"): run_history.loss}, maximum, SMOOTHING)
    if run_history.validations:
        steps = sorted(run_history.validations)
        losses = [run_history.validations[step] for step in steps]
        best_index = losses.index(min(losses))
        has_dots = len(steps) < MAX_DOTS
        curves.append(Curve(say("validation"), steps, losses, has_dots=has_dots, best=best_index))
    return Chart(curves, "step", "loss", say("Loss"))


def list_charts(run_history: RunHistory, maximum: int = MAX_BINS) -> list[Chart]:
    """Return the charts of a run's page.

    Args:
        run_history: Content of the run's history.
        maximum: Approximate number of points of a curve.
    """
    # values that features record are drawn in the charts that the features declare, or each in its own chart
    declared = () if run_history.start is None else run_history.start.charts
    uncharted = find_uncharted([*run_history.metrics], declared)
    seconds = make_curves({say("seconds"): run_history.seconds}, maximum)
    # The chart of the training loss by expert, or for families with audio by stream
    curves = {name.replace("_", " "): run_history.experts[name] for name in sorted(run_history.experts)}
    is_by_stream = curves.keys() <= {IMAGE_STREAM, AUDIO_STREAM}
    title = say("Loss of video and audio") if is_by_stream else say("Loss of each transformer")
    # The chart of the learning rates, by the trained part
    rates: dict[str, Points] = {}
    for name, points in run_history.rates.items():
        rates[name.removeprefix("lr/").replace("unet", "transformer")] = points
    charts = [
        _draw_losses(run_history, maximum),
        Chart(make_curves(curves, maximum, SMOOTHING), "step", "loss", title),
        *(_draw_metrics(run_history, chart, maximum) for chart in (*declared, *uncharted)),
        Chart(make_curves(rates, maximum), "step", "learning rate", say("Learning rate")),
        Chart(seconds, "step", "seconds", say("Seconds per step")),
        _draw_validations_by_timestep(run_history, maximum),
    ]
    return [chart for chart in charts if chart.curves]


def _draw_validations_by_timestep(run_history: RunHistory, maximum: int) -> Chart:
    """Return the chart of the validation losses, by timestep."""
    by_timestep: dict[str, Points] = {}
    for name, points in run_history.validations_by_level.items():
        by_timestep[f"timestep {name.rpartition('_')[2]}"] = points
    curves = make_curves(by_timestep, maximum, has_dots=True)
    return Chart(curves, "step", "loss", say("Validation loss by noise"))


def _draw_metrics(run_history: RunHistory, chart: MetricChart, maximum: int) -> Chart:
    points = {label: run_history.metrics.get(name, {}) for label, name in chart.curves.items()}
    return Chart(make_curves(points, maximum, SMOOTHING), "step", chart.unit, say(chart.title))


def make_curves(
    named: Mapping[str, Points], maximum: int, smoothing: float = 0.0, has_dots: bool = False
) -> list[Curve]:
    """Return a curve for each entry of `named` that has points.

    Args:
        named: Values by step, by the name of the curve.
        maximum: Approximate number of points of a curve; more are averaged in bins, with a low and a high.
        smoothing: Smoothing of long curves; short ones are not smoothed.
        has_dots: Whether short curves get a dot for each point.
    """
    curves = []
    for name, points in named.items():
        bins = join_bins(points, maximum)
        is_binned = any(len(values) > 1 for values in bins.values())
        curves.append(
            Curve(
                name,
                [*bins],
                [sum(values) / len(values) for values in bins.values()],
                smoothing=smoothing if len(bins) > MIN_SMOOTHED else 0.0,
                low=[*map(min, bins.values())] if is_binned else None,
                high=[*map(max, bins.values())] if is_binned else None,
                has_dots=has_dots and len(bins) < MAX_DOTS,
            )
        )
    return [curve for curve in curves if curve.x]


def join_bins(points: Points, maximum: int = MAX_BINS) -> dict[float, list[float]]:
    """Group points into about `maximum` equal ranges of steps; return values by the middle step of each."""
    bin_width = 1
    while points and (max(points) - min(points)) // bin_width >= maximum:
        bin_width *= 2
    points_by_bin = defaultdict[int, dict[int, float]](dict)
    for step, value in points.items():
        if value is not None:
            points_by_bin[step // bin_width][step] = value
    bins = {}
    for index in sorted(points_by_bin):
        bin_points = points_by_bin[index]
        middle_step = (min(bin_points) + max(bin_points)) / 2
        bins[middle_step] = [*bin_points.values()]
    return bins


def list_tiles(standing: Standing, run_history: RunHistory) -> list[Tile]:
    """Return the tiles at the top of the page, each with a label, a value and a note."""
    declared = () if run_history.start is None else run_history.start.tiles
    # Title, value and note of the tile with the current step
    resumed = [f"{step:,}" for step in run_history.starts if step > 0]
    note = say("resumed at step %(steps)s", steps=", ".join(resumed[-3:])) if resumed else ""
    shown = say(
        "%(step)s of %(total_steps)s",
        step=f"{standing.step:,}",
        total_steps=f"{standing.start.total_steps:,}",
    )
    tiles = [
        (say("Step"), shown, note),
        _make_loss_tile(run_history),
        _validation_tile(run_history),
        *[_make_metric_tile(run_history, tile) for tile in declared],
        _skip_tile(run_history),
        _make_seconds_tile(run_history),
    ]
    return [tile for tile in tiles if tile is not None]


def _make_metric_tile(run_history: RunHistory, tile: MetricTile) -> Tile | None:
    values = [value for value in run_history.metrics.get(tile.number, {}).values() if value is not None]
    if not values:
        return None
    last = values[-SHOWN:]
    note = f"{tile.note}; mean of the last {format_count(len(last), 'step')}"
    return tile.title, f"{sum(last) / len(last):.0%}", note


def _skip_tile(run_history: RunHistory) -> Tile | None:
    if not run_history.skipped:
        return None
    last = [f"{step:,}" for step in sorted(run_history.skipped)[-3:]]
    note = say("not taken; the last: %(steps)s", steps=", ".join(last))
    return say("Skipped steps"), f"{len(run_history.skipped):,}", note


def _validation_tile(run_history: RunHistory) -> Tile | None:
    if run_history.lowest_validation is None:
        return None
    step, loss = run_history.lowest_validation
    return say("Best validation loss"), f"{loss:.4g}", say("at step %(step)s", step=f"{step:,}")


def _make_seconds_tile(run_history: RunHistory) -> Tile | None:
    seconds = [number for number in run_history.seconds.values() if number is not None]
    if not seconds:
        return None
    last = seconds[-SHOWN:]
    note = say_count(
        len(last),
        "mean of the last %(n)s step, without pauses; %(time)s in all",
        "mean of the last %(n)s steps, without pauses; %(time)s in all",
        time=say_duration(sum(seconds)),
    )
    return say("Seconds per step"), f"{sum(last) / len(last):.3g}", note


def _make_loss_tile(run_history: RunHistory) -> Tile | None:
    """Return the tile of the training loss; None if no step had a finite one."""
    if all(loss is None for loss in run_history.loss.values()):
        return None
    if run_history.average is not None:  # same value as in the bar, the box at the end and the list of runs
        mean, note = run_history.average, say("average of the last steps, at most an epoch")
    else:
        bins = [*join_bins(run_history.loss).values()]  # losses of neighboring steps
        last_tenth = bins[-max(1, len(bins) // 10) :]
        latest = [loss for losses in last_tenth for loss in losses]
        mean = sum(latest) / len(latest)
        note = say_count(len(latest), "mean of the last %(n)s step", "mean of the last %(n)s steps")
    num_not_finite = sum(loss is None for loss in run_history.loss.values())
    if num_not_finite:
        note = say("%(mean)s; %(n)s steps without a finite loss", mean=note, n=f"{num_not_finite:,}")
    return say("Loss"), f"{mean:.4g}", note


def list_files(run_history: RunHistory, folder: Path) -> list[tuple[int, list[str]]]:
    """Return pairs of a step and its existing files; files of one pair have equal weights.

    The shortest name comes first. The last weights of a run are often saved twice: with the step in the name,
    and as the final file.
    """
    by_weights: dict[tuple[int, str], list[str]] = {}
    in_order = sorted((step, len(name), name) for name, step in run_history.saved.items())
    for step, _, name in in_order:
        with contextlib.suppress(OSError):
            status = (folder / name).stat()
            if stat.S_ISREG(status.st_mode):
                weights_hash = _read_weights_hash(folder / name, status.st_mtime_ns, status.st_size)
                # without a hash of the weights in its metadata, a file is not grouped with others
                by_weights.setdefault((step, weights_hash or name), []).append(name)
    return [(step, names) for (step, _), names in by_weights.items()]


@functools.lru_cache(maxsize=10_000)
def _read_weights_hash(path: Path, changed: int, size: int) -> str:
    """Return the SHA-256 of the tensors, as recorded in a LoRA file's metadata; "" if it is missing."""
    # `changed` and `size`, the file's modification time and size, serve only as part of the cache key.
    try:
        return read_safetensors_texts(path).get("sshs_model_hash", "")
    except (OSError, ValueError):
        return ""


def _list_saved_files(run_history: RunHistory, folder: Path, best: str | None) -> list[Mapping[str, Any]]:
    """Return the rows of the table of saved files, with the validation loss nearest to each."""
    rows: list[Mapping[str, Any]] = []
    for step, (name, *twins) in list_files(run_history, folder):  # twins have the weights of the first
        path = folder / name
        workflow = find_workflow(folder, name)
        validated = run_history.nearest_validation(step)
        loss = "" if validated is None else f"{validated.loss:.4g}"
        if validated is not None and validated.step != step:
            loss = say("%(loss)s (at step %(step)s)", loss=loss, step=f"{validated.step:,}")
        rows.append(
            {
                "name": name,
                "href": link(name),
                "workflow": workflow and link(workflow),
                "step": f"{step:,}",
                "loss": say("not measured (average)") if run_history.is_average(name) else loss,
                "size": format_size(path.stat().st_size),
                "twins": twins,
                "is_best": best in (name, *twins),
            }
        )
    return rows


def describe_best(run_history: RunHistory, best: str | None) -> str:
    """Return a sentence that names the best file, or says how to find it.

    Args:
        run_history: Content of the run's history.
        best: Name of the best saved file by validation loss; None if no file was saved.
    """
    lowest = run_history.lowest_validation
    if lowest is None:
        return say(
            "No validation loss was measured, so the page cannot say which file is best. Add "
            "--validation_split 0.1 --validate_every_n_steps 100, or 'validation = true' in a dataset table."
        )
    step, loss = lowest
    values = {"loss": f"{loss:.4g}", "step": f"{step:,}"}
    if best is None:
        return say(
            "The lowest validation loss is %(loss)s at step %(step)s; no file has been saved yet.", **values
        )
    if run_history.saved[best] == step:
        return say("Best file by validation loss: %(best)s.", best=best)
    return say(
        "Best file by validation loss: %(best)s. The lowest loss of all is %(loss)s at step %(step)s, where "
        "no file is kept: save and validate at the same steps to have both.",
        best=best,
        **values,
    )
