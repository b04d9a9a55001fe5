"""Walk through pages in a real browser by clicks that are drawn, and demand after each what always holds.

A walk finds by itself what can be pressed or typed into, so new pages and buttons are walked too. Each click
is noted; a list of clicks can be walked again.
"""

import json
import logging
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from browser.jobs.jobs import LOGS, WAITING, JobQueue, launch
from browser.jobs.render_worker import RenderWorker
from browser.runs.runs import RUNNING
from modules.errors import OptionError
from tests.browser.serving import Served
from tests.chromium import read_page

SCRIPT = Path(__file__).with_name("walking.js")
KINDS = {"button": 6, "field": 4, "nav": 2, "link": 2, "summary": 1}  # how often each is drawn
TEXTS = (
    *("", " ", "0", "1", "-1", "7", "0.5", "1e9", "999999999999", "nan", "20", "64"),
    *("a cat", "ä ö ü ß", '🎬 it\'s "quoted"', "<b>bold</b>", "../..", "--seed 5", "x" * 400),
)
NUMBERS = ("", "0", "1", "2", "12", "20", "30", "48", "64", "-1", "1e9", "0.5", "999999999999", "many")
QUIET_SECONDS = 0.15  # without a request, after which a page is at rest
MAX_SECONDS = 60  # for a page to come to rest: scripts check the options of their commands
POLL_SECONDS = 12  # in which each page has asked for what is new
CLICK_SECONDS = 3  # for a control to become one that can be pressed
MAX_ASKED = 12  # addresses that are asked for at once
TYPING_SECONDS = 0.35  # after which a page asks what its fields mean
STEADY = 8  # clicks for which an address that has answered counts as there
MAX_SHIFT = 60  # pixels that a page may move under its reader
MEDIA = ("image", "media", "font")  # kinds of requests that a page need not wait for
NOT_DRAWN = ("Load", "Download the model")  # beginnings of the names of buttons of downloads
GOES_ON = "--check"  # of a command that the page New begins by itself after the one of a press
FREE_OPTIONS = (
    "--seed",
    "--num_videos",
    "--num_images",
    "--images_per_prompt",
)  # drawn when pressed, or a count
PRINTS = "--print_run"  # of a command that only prints
REJECTED = (409, 422)  # statuses of a request that was refused, which the page then says
NOT_FOUND = re.compile("no longer exists|does not exist|renamed, moved or removed")


@dataclass(frozen=True)
class Click:
    """What was done: in which tab, where, to what; a text that was typed or chosen."""

    tab: int
    address: str
    key: str
    text: str | None = None
    enters: bool = False  # Enter follows the text, else Tab

    def __str__(self) -> str:
        typed = "" if self.text is None else f" <- {self.text[:60]!r}{', Enter' if self.enters else ''}"
        return f"tab {self.tab}, {self.address}: {self.key}{typed}"


@dataclass(frozen=True)
class Said:
    """What a tab says, and how the server stands."""

    page: Mapping[str, Any]  # of `says` in walking.js
    states: Sequence[str]  # of the jobs of the queue

    def has(self, pattern: str) -> bool:
        return re.search(pattern, "\n".join(self.page["messages"])) is not None

    @property
    def is_idle_run(self) -> bool:
        """Return whether it is the page of a run on which nothing works."""
        return bool(self.page["state"]) and not self.page["isActive"]


# what must not be said at once
CONTRADICTIONS: Mapping[str, Callable[[Said], bool]] = {
    "an empty queue with jobs": lambda it: (
        "The queue is empty." in it.page["text"] and bool(it.page["facts"]["jobs"])
    ),
    "an empty queue where the server has jobs": lambda it: (
        "The queue is empty." in it.page["text"] and bool(it.states)
    ),
    "a job that waits above, and none does": lambda it: it.has("it waits above") and WAITING not in it.states,
    "it does not run, and is active": lambda it: it.has("It is not running") and bool(it.page["isActive"]),
    "stop it first, and nothing runs": lambda it: it.has("stop it first") and it.is_idle_run,
    "it is running already, and nothing is": lambda it: (
        it.has("It is already running|is already in the queue") and it.is_idle_run
    ),
    "asked to end, and it has ended": lambda it: (
        it.has("Requested: it saves|asked to stop") and it.is_idle_run
    ),
    "taken out of the queue, and in it": lambda it: (
        it.has("removed from the queue") and "waiting" in it.page["state"]
    ),
    "it is in the queue, and is not": lambda it: it.has("^It is in the queue") and it.is_idle_run,
    "the queue goes on, and is paused": lambda it: (
        it.has("The queue goes on") and "paused" in it.page["state"]
    ),
    "not described, and described": lambda it: it.has("^not prepared") and " Training " in it.page["text"],
    "no run, and runs": lambda it: "No run yet" in it.page["text"] and bool(it.page["facts"]["runs"]),
    "nothing runs, and a job does": lambda it: "nothing runs ·" in it.page["text"] and RUNNING in it.states,
}


class Tab:
    """A page of the browser, with the requests that are on their way and those that were refused."""

    def __init__(self, number: int, page: Any) -> None:
        self.number = number
        self.page = page
        self.under_way: set[Any] = set()
        self.quiet_since = time.monotonic()  # the last request, answer or click
        self.bad: list[tuple[int, str, str]] = []  # status, method and address of a request
        self.dialogs = 0
        page.on("request", self._begin)
        page.on("requestfinished", self._end)
        page.on("requestfailed", self._end)
        page.on("response", self._note)
        page.on("dialog", self._answer)

    def _begin(self, request: Any) -> None:
        if request.resource_type not in MEDIA:
            self.under_way.add(request)
            self.quiet_since = time.monotonic()

    def _end(self, request: Any) -> None:
        if request in self.under_way:
            self.under_way.remove(request)
            self.quiet_since = time.monotonic()

    def _note(self, response: Any) -> None:
        if response.status >= 400:
            self.bad.append((response.status, response.request.method, response.url))

    def _answer(self, dialog: Any) -> None:
        self.dialogs += 1
        if self.dialogs % 3:
            dialog.accept()
        else:
            dialog.dismiss()

    def rest(self) -> None:
        """Wait until the page asks for nothing any more."""
        end = time.monotonic() + MAX_SECONDS
        self.page.wait_for_timeout(1)  # takes what has come in
        while self.under_way or time.monotonic() < self.quiet_since + QUIET_SECONDS:
            if time.monotonic() > end:
                break
            self.page.wait_for_timeout(30)
        if self.under_way:
            late = [request.url for request in self.under_way]
            self.under_way.clear()
            raise AssertionError(f"no answer after {MAX_SECONDS} seconds: {late}")

    def ask(self, name: str, *arguments: object) -> Any:
        """Return what a function of walking.js answers on this page."""
        call = "([name, words]) => globalThis.walker ? walker[name](...words) : false"
        for _ in range(int(MAX_SECONDS / 0.1)):
            answer = read_page(self.page, self.page.evaluate, call, [name, list(arguments)])
            if answer is not None and answer is not False:
                return answer
            self.page.wait_for_timeout(100)
        raise AssertionError(f"{self.page.url} never answered {name}")

    def find(self, key: str) -> Any:
        """Return the control of a key; None if it is not there any more."""
        handle = read_page(self.page, self.page.evaluate_handle, "(key) => walker.find(key)", key)
        return None if handle is None else handle.as_element()


@dataclass
class World:
    """A server with all that it keeps, and what its logs have told."""

    served: Served
    root: Path
    queue: JobQueue
    worker: RenderWorker
    texts: Sequence[str]  # that make sense in a field here: folders, files, command lines
    upload: Path  # a file to send
    token: str  # of the server
    traces: list[str] = field(default_factory=list)  # tracebacks in the server's log

    def list_started(self) -> dict[str, tuple[list[str], str]]:
        """Return the program and its folder of each thing that was ever started, by a name of its own."""
        started = {}
        for job in self.queue.jobs():
            started[f"job {job.id}"] = program_of(job.line, Path(job.folder))
        for path in (self.queue.folder / LOGS).glob("*-*.json"):
            record = json.loads(path.read_text(encoding="utf-8"))
            name = f"{path.stem} {record['process']}"
            started[name] = program_of(record["line"], Path(record["folder"]))
        for render_job in self.worker.list_all():
            _, program = launch.find_program(render_job.command, Path(render_job.folder))
            started[f"render job {render_job.id}"] = (program, render_job.folder)
        return {name: program for name, program in started.items() if program is not None}

    def take_tracebacks(self) -> list[str]:
        """Return new tracebacks of the server, and those in the output of what it has started."""
        traces, self.traces = self.traces, []
        for path in (self.queue.folder / LOGS).glob("*.log"):
            text = path.read_text(encoding="utf-8", errors="replace")
            if "Traceback (most recent call last)" in text:
                traces.append(f"{path.name}: {text[-1500:]}")
        return traces

    @contextmanager
    def watch_log(self) -> Iterator[None]:
        """Note what the server logs with a traceback, and what ends a thread of it, until the block ends."""
        handler = logging.Handler(logging.DEBUG)
        handler.emit = self._note_record  # type: ignore[method-assign]
        loggers = [logging.getLogger(name) for name in ("browser.core.server", "uvicorn.error", "asyncio")]
        levels = [logger.level for logger in loggers]
        hook = threading.excepthook
        threading.excepthook = lambda told: self.traces.append(f"in a thread: {told.exc_value!r}")
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            threading.excepthook = hook
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(level)

    def _note_record(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.traces.append(logging.Formatter("%(message)s").format(record))


def program_of(line: str, folder: Path) -> tuple[list[str], str] | None:
    """Return the program that a command line starts and its folder; None if it is not a command of ours."""
    try:
        command, place = launch.split_folder(line.strip(), folder)
        _, program = launch.find_program(launch.split_arguments(command), place)
    except OptionError:
        return None
    return program, str(place)


def without_free(program: Sequence[str]) -> list[str]:
    """Return the words of a program without those that are drawn only when it is started."""
    kept = []
    words = iter(program)
    for word in words:
        if word in FREE_OPTIONS:
            next(words, None)
        else:
            kept.append(word)
    return kept


class Walk:
    """A walk through the pages of a server in some tabs."""

    def __init__(self, world: World, pages: Sequence[Any], seed: int) -> None:
        self.world = world
        self.tabs = [Tab(number, page) for number, page in enumerate(pages)]
        self.random = random.Random(seed)
        self.clicks: list[Click] = []
        self.times: Counter[str] = Counter()  # that a control was used
        self.answered: dict[str, int] = {}  # address -> number of the click when it answered
        self.faults: list[str] = []
        self.place: Mapping[str, Any] = {}  # of the page, just before the click
        self.shown: Sequence[str] = ()  # the commands beside what is used, just before
        self.promised: set[str] = set()  # commands that were shown as what follows a press

    # ---- drawing

    def draw(self) -> Click | None:
        """Return what is to be done next; None if the page of the drawn tab has nothing to press."""
        tab = self.random.choice(self.tabs)
        tab.rest()
        address = tab.ask("says")["address"]
        by_kind: dict[str, list[Mapping[str, Any]]] = {}
        for control in tab.ask("list"):
            if self.may_use(control):
                by_kind.setdefault(control["kind"], []).append(control)
        if not by_kind:
            return None
        kinds = sorted(by_kind)
        (kind,) = self.random.choices(kinds, [KINDS[name] for name in kinds])
        controls = by_kind[kind]
        weights = [1 / (1 + self.times[self.plain(address, control)]) ** 2 for control in controls]
        (control,) = self.random.choices(controls, weights)
        self.times[self.plain(address, control)] += 1
        is_typed = kind == "field" and control["type"] not in ("checkbox", "radio")
        text = self.draw_text(control) if is_typed else None
        enters = is_typed and control["type"] in ("text", "search") and self.random.random() < 0.15
        return Click(tab=tab.number, address=address, key=control["key"], text=text, enters=enters)

    @staticmethod
    def plain(address: str, control: Mapping[str, Any]) -> str:
        """Return what equal controls of equal pages have in common."""
        return re.sub(r"[0-9a-f]{8,}|\d+", "#", f"{address.partition('?')[0]} {control['key']}")

    def may_use(self, control: Mapping[str, Any]) -> bool:
        """Return whether a control leads nowhere outside, and loads no gigabytes."""
        if control["kind"] in ("link", "nav"):
            return str(control["href"]).startswith(self.world.served.url)
        name = control["key"].partition('"')[2].partition('"')[0]
        return not control["isDownload"] and not name.startswith(NOT_DRAWN)

    def draw_text(self, control: Mapping[str, Any]) -> str:
        """Return a text for a field: one that makes sense, one at a limit, or one of its choices."""
        if control["options"]:
            return str(self.random.choice(control["options"]))
        if control["type"] == "range":
            return str(self.random.choice(["0", "0.5", "1"]))
        if control["type"] == "file":
            return ""
        if control["isNumber"]:
            return self.random.choice(NUMBERS)
        if control["name"] in ("folder", "line", "start", "references", "redraw"):
            return self.random.choice([*self.world.texts, *TEXTS[:3]])
        return self.random.choice([*self.world.texts, *TEXTS, *TEXTS])

    # ---- walking

    def step(self) -> None:
        """Draw a click and do it, until one was possible."""
        for _ in range(20):
            click = self.draw()
            if click is None:
                self.go_home(self.tabs[self.random.randrange(len(self.tabs))])
            elif self.do(click):
                return
        raise AssertionError("nothing on these pages can be pressed")

    def go_home(self, tab: Tab) -> None:
        """Leave a page without anything to press, such as a picture."""
        tab.page.goto(self.world.served.url)
        tab.quiet_since = time.monotonic()

    def do(self, click: Click) -> bool:
        """Do a click and look at everything afterwards; return whether it was possible."""
        tab = self.tabs[click.tab]
        element = tab.find(click.key)
        if element is None:
            return False
        before = self.world.list_started()
        self.shown = tab.ask("commandsOf", click.key)
        others = [(other, other.ask("hold")) for other in self.tabs if other is not tab]
        for each in self.tabs:
            each.bad.clear()
            each.page.problems.clear()
        if not self.use(tab, element, click):
            return False
        self.clicks.append(click)
        tab.quiet_since = time.monotonic()
        tab.rest()
        self.look_at_answers(tab)
        self.look_at_place(tab, click)
        for other, place in others:
            other.rest()
            self.compare_places(other, place, other.ask("place"), "while the other tab was used")
        if not click.key.startswith(("link", "nav")):  # a page may have something read when it is opened
            self.look_at_started(self.shown, before)
        self.faults += [f"traceback: {trace}" for trace in self.world.take_tracebacks()]
        self.look_when_settled()
        return True

    def use(self, tab: Tab, element: Any, click: Click) -> bool:
        """Press or fill a control; return whether it could be."""
        from playwright.sync_api import Error

        limit = CLICK_SECONDS * 1000
        try:
            element.scroll_into_view_if_needed(timeout=limit)
            self.place = tab.ask("hold", click.key)
            kind = element.evaluate("(one) => one.tagName === 'SELECT' ? 'select' : one.type ?? ''")
            if click.text is None:
                element.click(timeout=limit)
            elif kind == "select":
                element.select_option(value=click.text, timeout=limit)
                tab.rest()  # a choice that begins something at once shows its command then
                self.shown = [*self.shown, *tab.ask("commandsOf", click.key)]
            elif kind == "file":
                element.set_input_files(self.world.upload, timeout=limit)
            else:
                element.fill(click.text, timeout=limit)
                if click.enters:  # the command of what was typed is there
                    tab.page.wait_for_timeout(TYPING_SECONDS * 1000)
                    tab.rest()
                    self.shown = tab.ask("commandsOf", click.key)
                element.press("Enter" if click.enters else "Tab", timeout=limit)
        except Error:  # a poll has taken it away, or it lies below a dialog
            return False
        return True

    # ---- what has to hold

    def fault(self, text: str) -> None:
        self.faults.append(text)

    def look_at_answers(self, tab: Tab) -> None:
        """Each answer is good; a refusal is said, and what is gone is called so."""
        for each in self.tabs:
            said = each.ask("says") if each.bad else {}
            for status, method, address in each.bad:
                is_told = status in REJECTED and each is tab and said["messages"]
                is_gone = status == 404 and NOT_FOUND.search(said["text"])
                if not is_told and not is_gone:
                    self.fault(f"{status} to {method} {address} in tab {each.number}")
            for error in each.page.problems:
                if "Failed to load resource" not in error:
                    self.fault(f"tab {each.number}: {error}")

    def look_at_place(self, tab: Tab, click: Click) -> None:
        """The focus stays at what was used, and the page does not jump; unless another page was opened."""
        after = tab.ask("place")
        if after["born"] != self.place["born"] or after["dialog"] != self.place["dialog"]:
            return
        if click.key.startswith(("link", "nav")):
            return
        is_left = click.text is not None and not click.enters  # Tab leads from the last field to the browser
        if not after["focus"] and not is_left:
            self.fault(f"the focus is lost after {click.key}")
        is_led = after["focus"] not in ("", self.place["pressed"])  # to a field that is filled, for example
        if not is_led:
            self.compare_places(tab, {**self.place, "focus": ""}, after, f"after {click.key}")

    def compare_places(
        self, tab: Tab, before: Mapping[str, Any], after: Mapping[str, Any], when: str
    ) -> None:
        """A page that was not left keeps its place, and the focus if there was one."""
        if before["born"] != after["born"]:
            return
        if before["focus"] and not after["focus"]:
            self.fault(f"tab {tab.number} has lost the focus of {before['focus']} {when}")
        is_at_end = after["top"] >= after["most"] - 2
        if after["shift"] > MAX_SHIFT and not is_at_end:
            self.fault(f"tab {tab.number} has jumped by {after['shift']:.0f} pixels {when}")

    def look_at_started(self, shown: Sequence[str], before: Mapping[str, object]) -> None:
        """What was started is one of the commands that stood beside the button."""
        lines = [line for text in shown for line in [text, *text.splitlines()]]
        self.promised |= {line for line in lines if GOES_ON in line}
        lines += self.promised if lines else ()
        programs = [found for line in lines if (found := program_of(line, Path.cwd())) is not None]
        if not programs:
            return
        typed = [without_free(words) for words, _ in programs]
        for name, (program, _) in self.world.list_started().items():
            is_read = PRINTS in program  # what a page has looked up for itself
            if name not in before and not is_read and without_free(program) not in typed:
                text = " ".join(without_free(program)[1:])
                self.fault(f"{name} runs {text}, and the page showed {[' '.join(one[1:]) for one in typed]}")

    def look_when_settled(self) -> None:
        """What a page may learn with its next poll holds after that."""
        end = time.monotonic() + POLL_SECONDS
        while next(self.list_unsettled(), None) is not None:
            if time.monotonic() > end:
                self.faults += self.list_unsettled()
                return
            for tab in self.tabs:
                tab.page.wait_for_timeout(300)
                tab.rest()

    def list_unsettled(self) -> Iterator[str]:
        """Yield what differs between pages and server now, first what is found out soonest."""
        states = [job.state for job in self.world.queue.jobs()]
        for tab in self.tabs:
            yield from self.list_contradictions(tab, states)
        for tab in self.tabs:
            place = f"tab {tab.number}, {tab.page.url.removeprefix(self.world.served.url)[:80]}"
            yield from (f"{place} names {text}" for text in self.list_missing(tab))
            for id, text, answer in tab.ask("compareAnswers"):
                yield f"{place}: #{id} shows {text[-300:]!r}, and its fields mean {answer[-300:]!r}"

    def list_contradictions(self, tab: Tab, states: Sequence[str]) -> Iterator[str]:
        """Yield what a page says against itself, the states of the jobs, or its reloaded self."""
        said = Said(tab.ask("says"), states)
        place = f"tab {tab.number}, {said.page['address'][:80]}"
        for name, applies in CONTRADICTIONS.items():
            if applies(said):
                yield f"{place} says {name}: {said.page['messages']}"
        if said.page["twice"]:
            yield f"{place} has these twice: {said.page['twice']}"
        reloaded = tab.ask("reloaded")
        for name, texts in said.page["facts"].items():
            if texts != reloaded[name]:
                yield f"{place}: {name} are {texts}, and {reloaded[name]} when it is loaded again"

    def list_missing(self, tab: Tab) -> Iterator[str]:
        """Yield the addresses and files that a page names and that are not there."""
        number = len(self.clicks)
        due = [one for one in tab.ask("addresses") if self.answered.get(one, -STEADY) + STEADY <= number]
        for address in due[:MAX_ASKED]:
            place = address.removeprefix(self.world.served.url)
            status = self.world.served.ask(place, Authorization=f"Bearer {self.world.token}").status
            if status in (200, 204, 303):
                self.answered[address] = len(self.clicks)
            else:
                yield f"{address}, which answers {status}"
        for path in tab.ask("files"):
            if not Path(path).exists():
                yield f"{path}, which is not there"

    # ---- to walk again

    def report(self) -> str:
        """Return the faults and the clicks that led to them."""
        lines = [f"{number:3} {click}" for number, click in enumerate(self.clicks)]
        return "\n".join([*self.faults, "", "after these clicks:", *lines])

    def save(self, path: Path) -> None:
        """Write the clicks so that `read_clicks` reads them."""
        path.write_text(json.dumps([asdict(click) for click in self.clicks], indent=1), encoding="utf-8")


def read_clicks(path: Path) -> list[Click]:
    """Return the clicks of a walk that was saved."""
    return [Click(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
