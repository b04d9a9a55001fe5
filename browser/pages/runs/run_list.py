"""The page that lists the runs: which are shown, and in which order."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from browser.core.short_names import short_digest
from browser.core.state_names import name_state
from browser.core.templates import show_page
from browser.runs.run_start import ACTIVE_STATES, STATES, RunState, TrackedRun, read_run_state
from browser.runs.run_views import label_runs
from browser.runs.runs import RUNNING, RunSummary
from downloads.catalogue import model_title
from modules.pages.language import language, say

MAX_RUNS = 200  # maximum length of a list, until the user asks for all
MAX_CARDS = 60  # maximum number of cards; longer lists are tables, unless the user asks for cards
LIST_CHOICES = ("text", "family", "state", "sort", "view", "all")  # fields of the form above a list of runs
SORTS = {
    "newest": lambda run: -run.changed,
    "name": lambda run: (run.name.lower(), -run.changed),
    "loss": lambda run: run.loss,
    "progress": lambda run: -run.step / max(run.total_steps, 1),
}
SORT_NAMES = (say("newest"), say("name"), say("loss"), say("progress"))


def select_runs(
    runs: Sequence[RunSummary], query: Mapping[str, str], states: Mapping[str, RunState] | None = None
) -> list[RunSummary]:
    """Filter and sort training runs for the page that lists them.

    Args:
        query: Fields `text`, `family`, `state` and `sort`.
        states: State of each run by its id; None to use only the histories.
    """
    # compare titles: older and newer runs may have different internal names for one model
    title = model_title(query["family"]) if query.get("family") else None
    selected_runs = [run for run in runs if title in (None, run.title)]
    if query.get("text"):
        selected_runs = [run for run in selected_runs if _has_words(run, query["text"])]
    wanted_state = query.get("state")
    if wanted_state:
        # `running` also selects runs that download, cache or load
        wanted_states = (RUNNING, *ACTIVE_STATES) if wanted_state == RUNNING else (wanted_state,)
        selected_runs = [run for run in selected_runs if _find_state_name(run, states) in wanted_states]
    sort_key = SORTS.get(query.get("sort", ""), SORTS["newest"])
    return sorted(selected_runs, key=sort_key)


def _has_words(run: RunSummary, text: str) -> bool:
    """Return whether the name, model or folder of a run contains all words of a search text, in any case."""
    searched_text = f"{run.name} {run.model} {run.title} {run.history.parent}".lower()
    return all(word in searched_text for word in text.lower().split())


def _find_state_name(run: RunSummary, states: Mapping[str, RunState] | None) -> str:
    """Return the name of a run's state among `states`; without it there, of the state in its history."""
    state = (states or {}).get(run.id) or read_run_state(run)
    return state.name


def mark_list(runs: Sequence[TrackedRun], query: Mapping[str, str]) -> str:
    """Return a key that changes when anything that a list of runs shows has changed."""
    displayed_values = []
    for tracked_run in runs:
        run, state = tracked_run.summary, tracked_run.state
        displayed_values.append((run.id, run.changed, state.text, state.reason, state.is_stop_requested))
    return short_digest(repr((displayed_values, sorted(query.items()), language().code)), 12)


def list_page(
    tracked_runs: Sequence[TrackedRun],
    roots: Sequence[Path],
    query: Mapping[str, str],
    can_write: bool = True,
) -> str:
    """Return the HTML page that lists the runs. `roots` are the folders in which they were found."""
    runs = [tracked_run.summary for tracked_run in tracked_runs]
    states = {tracked_run.summary.id: tracked_run.state for tracked_run in tracked_runs}
    selected_runs = select_runs(runs, query, states)
    listed_runs = selected_runs if query.get("all") else selected_runs[:MAX_RUNS]
    families = {run.title for run in runs if run.model}
    view = query.get("view")
    # many runs are listed in a table, unless cards were requested
    is_table = view == "table" or (len(selected_runs) > MAX_CARDS and view != "cards")
    values = {
        "runs": label_runs(listed_runs),
        "is_table": is_table,
        "date": lambda run: f"{datetime.fromtimestamp(run.changed):%Y-%m-%d %H:%M}",
        "chosen": len(selected_runs),
        "count": len(runs),
        "running": sum(state.name in ACTIVE_STATES for state in states.values()),
        "states_of_runs": states,
        "can_write": can_write,
        "families": sorted(families, key=str.lower),
        "asked": {name: query.get(name, "") for name in LIST_CHOICES},
        "states": [name_state(name) for name in (RUNNING, *STATES)],
        "sorts": SORT_NAMES,
        "roots": roots,
    }
    return show_page("runs/runs.html", say("Runs"), values)
