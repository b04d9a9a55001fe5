"""Use a GPU that is lent for minutes: probes, checks and rows in one command, the most important first.

    python benchmarks/gpu_session.py --prepare --output session     without a GPU: plan all rows ahead
    python benchmarks/gpu_session.py --dry --output session         what it would do, and how long it may take
    python benchmarks/gpu_session.py --output session --seconds 540
    python benchmarks/gpu_session.py --output session --seconds 300 --again
    python benchmarks/gpu_session.py --output session --parts waiting further checks long \\
        --seconds 840 --check_seconds 200

Parts run in the order of --parts. By default these are the probes (gpu_steps.py), the tests marked `gpu`
(gpu_checks.py), the rows of the goals, then the other rows (gpu_rows.py): first those that share least with
what is measured. The last command above measures steps that waited for the host first; each part leaves the
seconds of the parts behind it. Everything is written to the
folder of --output at once, also the messages of tests that fail, so that a kill loses only what is under way:
plans.json, probes.json, checks.json, failures.txt, rows.json and tables.md. A second command goes on with the
folder; --again repeats what failed, too. Rows run in this process, which saves their start; after an error of
CUDA, which spoils a process, the others get one of their own.
"""

import argparse
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks import gpu, gpu_checks  # noqa: E402
from benchmarks.gpu_rows import (  # noqa: E402
    BY_NAME,
    CACHING,
    LOADING,
    ROWS,
    TRAINING,
    Expected,
    Results,
    Row,
    continue_results,
    correction,
    expect,
    read_results,
    tables,  # noqa: E402
)
from modules.atomic_write import write_text  # noqa: E402

# rows of a part, in their order
LISTS: Mapping[str, Sequence[str]] = {
    # steps that waited for the host, each first without and then with what removes kernels
    "waiting": (
        *("sdxl-bf16-kept", "sdxl-bf16", "sdxl-bf16-compiled", "sd1.5-bf16-kept", "sd1.5-bf16"),
        *("lumina-512-bf16", "z-image-512-bf16", "flux-bf16", "flux-bf16-compiled"),
        *("krea2-bf16", "krea2-bf16-compiled"),
    ),
    "further": ("moss-image-bf16", "qwen-image-bf16-compiled", "z-image-bf16-compiled"),
    # a clip's attention in 16 and in 8 bits
    "long": ("gen-wan1.3b-eager", "gen-wan1.3b-sage"),
}
DEFAULT_PARTS = ("probes", "checks", "goals", "rows")
PARTS = (*DEFAULT_PARTS, *LISTS)
SECONDS = 540.0
CHECK_SHARE = 0.45  # of the seconds, at most, for the tests
PROBE_SECONDS = 30.0  # a guess
HEADS = 10.0  # seconds, a guess: the peaks of the device, and the first start of CUDA
# rows whose figures stand in RESULTS.md: what is like them is known
MEASURED = (
    *("wan14b-bf16-compiled", "wan14b-fp8-products-compiled", "flux-bf16-compiled", "qwen-image-bf16"),
    *("krea2-bf16", "ltx2.3-bf16", "flux-fp8-products-compiled", "wan14b-short-bf16-compiled"),
    *("wan14b-short-fp8-products-compiled", "wan14b-short-bf16-swap30-compiled", "wan14b-nf4-12gib"),
    "load-fp8",
)
FORMS = {
    "--fp8_fast": "fp8 products",
    "--fp8_base": "fp8 weights",
    "--fp8_scaled": "fp8 weights",
    "--convrot_int8": "int8",
    "--nf4_base": "nf4",
}
WAYS = ("--compile", "--blocks_to_swap", "--gradient_checkpointing_cpu_offload", "--attn_mode")
SPOILED = ("CUDA error", "AcceleratorError", "device-side assert", "illegal memory")


@dataclass(frozen=True)
class SessionFiles:
    """The files of a session, each rewritten whenever there is something new."""

    folder: Path

    @property
    def plans(self) -> Path:
        """Estimates of rows."""
        return self.folder / "plans.json"

    @property
    def probes(self) -> Path:
        """Results of the probes."""
        return self.folder / "probes.json"

    @property
    def checks(self) -> Path:
        """Results of the tests."""
        return self.folder / "checks.json"

    @property
    def failures(self) -> Path:
        """Messages of failed tests."""
        return self.folder / "failures.txt"

    @property
    def rows(self) -> Path:
        """Figures of the rows."""
        return self.folder / "rows.json"

    @property
    def tables(self) -> Path:
        """Tables of everything, in Markdown."""
        return self.folder / "tables.md"


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a session's file; empty if it does not exist yet."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a session's file."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


# Plans made ahead


def code_state() -> str:
    """Return a hash of the sources that plans depend on: all except tests."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.glob("*/**/*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(("tests/", ".", "benchmarks/gpu_session.py")):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class Plans:
    """Estimates of rows, by their names, as far as they were made in advance.

    Rows without one are planned when they are measured, which takes up to a minute of the GPU's time.
    """

    path: Path
    state: str = field(default_factory=code_state)
    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> "Plans":
        """Read a file of plans. Those of another state of the code are ignored."""
        plans, content = Plans(path), read_json(path)
        if content.get("code") == plans.state:
            plans.rows = content["rows"]
        elif content:
            print(f"{path} is of another state of the code. Run --prepare again, where no GPU waits.")
        return plans

    def make(self, rows: Iterable[Row]) -> None:
        """Plan missing rows without a GPU; each is written at once."""
        for row in rows:
            if row.name in self.rows or row.kind in (*CACHING, LOADING):
                continue
            begun = time.monotonic()
            self.rows[row.name] = plan_row(row)
            write_json(self.path, {"code": self.state, "rows": self.rows})
            planned = self.rows[row.name]["planned"] / 2**30
            print(f"{row.name}: {planned:.1f} GiB, {time.monotonic() - begun:.0f} s", flush=True)

    def with_plan(self, row: Row) -> Row:
        """Return a row with the planned bytes, if it was planned."""
        plan = self.rows.get(row.name)
        return row if plan is None else replace(row, planned=plan["planned"])

    def expected(self, row: Row) -> Expected:
        """Estimate the seconds of a row in this process; without a plan, from its kind alone."""
        plan = self.rows.get(row.name)
        if plan is None:
            return Expected(0.0, 0.0, row.seconds or 90.0)
        found = expect(row, plan["operations"], plan["size"])
        return replace(found, seconds=found.seconds - 15)  # the start of a process, and the plan

    def seconds(self, row: Row) -> float:
        """Return the estimated seconds of a row."""
        return self.expected(row).seconds


def plan_row(row: Row) -> dict[str, float]:
    """Return the bytes that the plan predicts, the operations of a call, and the size of the file."""
    import torch

    from benchmarks.gpu_steps import (
        call_operations,
        folder_for,
        generation_family,
        lay_out,
        plan_of_generation,
        plan_of_training,
        training_family,
    )

    with folder_for(row, None) as folder:
        path, high = lay_out(row, folder)
        full = gpu.with_vae(row, folder)
        cpu = torch.device("cpu")
        if row.kind == TRAINING:
            options, family = training_family(full, path)
            planned = plan_of_training(full, options, family, cpu)
        else:
            options, family = generation_family(full, path, high)
            planned = plan_of_generation(full, options, family, path, cpu)
        operations, _ = call_operations(full, options, family)
        files = 2 if high is not None else 1
        size = files * path.stat().st_size
    return {"planned": planned, "operations": operations, "size": size}


# Which row next


def traits_of(row: Row) -> set[str]:
    """Return what a row can show, in words that rows share."""
    form = next((FORMS[option] for option in FORMS if option in row.options), "16 bits")
    traits = {f"{row.model.family} {row.kind}", f"{form} {row.kind}", f"{form} {row.model.family}"}
    traits |= {f"{way} {row.kind}" for way in WAYS if way in row.options}
    if "--compile" in row.options:
        traits.add(f"--compile {row.model.family}")
    if row.card:
        traits.add(f"a card of {row.card:g} GiB")
    if row.model.high:
        traits.add("two experts")
    return traits


def next_row(rows: Iterable[Row], known: Iterable[str], seconds: Callable[[Row], float]) -> Row | None:
    """Return the row with most traits that no known row has; of equal ones the quickest, then the first.

    `known` are the names of rows that are measured.
    """
    seen: set[str] = set()
    for name in known:
        seen |= traits_of(BY_NAME[name]) if name in BY_NAME else set()
    return max(rows, key=lambda row: (len(traits_of(row) - seen), -seconds(row)), default=None)


# The session


RunRow = Callable[[Row, float], dict[str, Any]]


@dataclass
class Session:
    """The remaining time, and where everything is stored."""

    files: SessionFiles
    plans: Plans
    end: float  # by the monotonic clock
    device: str
    again: bool
    rows: Sequence[Row]
    run_row: RunRow
    reserved: float = 0.0  # seconds for later parts

    @property
    def left(self) -> float:
        """Seconds that are left for this part."""
        return self.end - time.monotonic() - self.reserved

    def probe(self) -> None:
        """Run the probes that have no result yet."""
        from benchmarks.gpu_steps import PROBES, run_probe

        found = read_json(self.files.probes)
        for probe in PROBES:
            result = found.get(probe.name)
            is_done = result is not None and not (self.again and "failed" in result)
            if is_done or self.left < probe.seconds:
                continue
            found[probe.name] = run_probe(probe, self.device)
            write_json(self.files.probes, found)
            print(f"{probe.name}: {json.dumps(found[probe.name])}", flush=True)

    def check(self, seconds: float, paths: Sequence[Path], markers: str = "gpu") -> None:
        """Run files of tests that have not passed before, in `seconds` for all."""
        before = read_json(self.files.checks)
        groups = [gpu_checks.Group(**group) for group in before.get("groups", ())]
        kept = [group for group in groups if group.is_good or not (self.again or is_unfinished(group))]
        names = {group.name for group in kept}
        left = [path for path in paths if gpu_checks.make_check_name(path) not in names]
        end = time.monotonic() + min(seconds, self.left)
        for group in gpu_checks.run_groups(
            left,
            markers,
            end,
            seconds=gpu_checks.GROUP_SECONDS,
            jobs=gpu_checks.jobs_here(),
            failures=self.files.failures,
        ):
            kept.append(group)
            print(gpu_checks.report(group), flush=True)
            gpu_checks.write_results(self.files.checks, gpu_checks.describe_machine(), kept)

    def measure(self, head: Mapping[str, Any], part: str) -> None:
        """Measure rows while there is time: those of the goals, of a list, or all as `next_row` orders."""
        results = continue_results(self.files.rows, dict(head))
        left_out: set[str] = set()
        while (row := self._next(results, left_out, part)) is not None:
            gpu.measure_all([row], results, self.left, self._run, expected=self.plans.seconds)
            if row.name not in results.rows:
                left_out.add(row.name)
            self.write_tables(results)

    def _next(self, results: Results, left_out: set[str], part: str) -> Row | None:
        waiting = [row for row in gpu.missing(self.rows, results, self.again) if row.name not in left_out]
        if self.again:  # one that fails again is not tried a third time
            left_out |= {row.name for row in waiting if row.name in results.rows}
        if part == "goals":
            return next((row for row in waiting if row.is_goal), None)
        measured = [name for name, figures in results.rows.items() if "failed" not in figures]
        guess = correction(results)
        fitting = [row for row in waiting if self.plans.seconds(row) * guess <= self.left]
        if part in LISTS:
            return next(iter(of_list(part, fitting)), None)
        return next_row(fitting, (*MEASURED, *measured), self.plans.seconds)

    def _run(self, row: Row, limit: float) -> dict[str, Any]:
        return self.run_row(self.plans.with_plan(row), limit)

    def write_tables(self, results: Results) -> None:
        """Write the results so far as a page."""
        checks = read_json(self.files.checks).get("groups", ())
        lines = ["# A session on a GPU", "", tables(results).rstrip()]
        if probes := read_json(self.files.probes):
            lines += ["", "## Probes", ""]
            lines += [f"- {name}: {json.dumps(found)}" for name, found in probes.items()]
        if checks:
            lines += ["", "## Checks", ""]
            lines += [f"- {gpu_checks.report(gpu_checks.Group(**group)).splitlines()[0]}" for group in checks]
        write_text(self.files.tables, "\n".join(lines) + "\n")


def of_list(part: str, rows: Iterable[Row]) -> list[Row]:
    """Return the rows that a part lists, in its order."""
    by_name = {row.name: row for row in rows}
    return [by_name[name] for name in LISTS[part] if name in by_name]


def reserve(session: Session, later: Sequence[str], checking: float) -> float:
    """Return the seconds that parts leave to the tests and to the last list of rows behind them."""
    seconds = checking if "checks" in later else 0.0
    if later and later[-1] in LISTS:
        seconds += sum(session.plans.seconds(BY_NAME[name]) for name in LISTS[later[-1]])
    return seconds


def is_unfinished(group: gpu_checks.Group) -> bool:
    """Return whether a file of tests did not come to its end."""
    return group.ended != "done"


@dataclass
class RowRunner:
    """Measures rows in this process, until a CUDA error has made it unusable."""

    device: str
    is_spoiled: bool = False

    def __call__(self, row: Row, limit: float) -> dict[str, Any]:
        """Measure a row within a limit in seconds, and return its figures."""
        job = gpu.Job(None, self.device)
        if self.is_spoiled:
            return job.run(row, limit)
        figures = job.run_here(row, limit)
        reason = str(figures.get("failed", ""))
        self.is_spoiled = any(word in reason for word in SPOILED)
        return figures


def head_on(device: str) -> dict[str, Any]:
    """Return the device and its peaks; a CPU, for a try, has no peaks."""
    if device != "cpu":
        return gpu.head_of(device)
    import torch

    name = "a CPU, where nothing is measured"
    return {
        "device": name,
        "torch": torch.__version__,
        "date": str(date.today()),
        "matmul": 1e12,
        "upload": 0,
    }


# The command


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="what is found, so far")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all; {SECONDS:.0f}")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(DEFAULT_PARTS), help="of the session"
    )
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these; default: all")
    parser.add_argument("--check_seconds", type=float, help=f"for tests; {CHECK_SHARE} of --seconds")
    parser.add_argument("--again", action="store_true", help="repeat what failed before, too")
    parser.add_argument("--prepare", action="store_true", help="plan rows ahead, without a GPU, and stop")
    parser.add_argument("--dry", action="store_true", help="print what would be done, and stop")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu: try the probes and the tests")
    return parser


def main(
    argv: Sequence[str] | None = None, rows: Sequence[Row] = ROWS, run_row: RunRow | None = None
) -> None:
    """Run a session. `rows` and `run_row` say what is measured, and how; by default in this process."""
    args = make_parser().parse_args(argv)
    rows = [row for row in rows if not args.rows or row.name in args.rows]
    if unknown := set(args.rows) - {row.name for row in rows}:
        raise SystemExit(f"--rows {' '.join(sorted(unknown))}: there is no such row")
    args.output.mkdir(parents=True, exist_ok=True)
    files = SessionFiles(args.output)
    plans = Plans.read(files.plans)
    if args.prepare:
        plans.make(rows)
        return
    seconds: float = args.seconds
    checking = CHECK_SHARE * seconds if args.check_seconds is None else args.check_seconds
    runner = RowRunner(args.device) if run_row is None else run_row
    end = time.monotonic() + seconds
    session = Session(files, plans, end, args.device, args.again, rows, run_row=runner)
    print_intentions(session, args.parts, seconds, checking)
    if args.dry:
        return
    head: dict[str, Any] = {}
    for index, part in enumerate(args.parts):
        session.reserved = reserve(session, args.parts[index + 1 :], checking)
        if part == "probes":
            session.probe()
        elif part == "checks":
            session.check(checking, gpu_checks.find_files(ROOT / "tests"))
        else:
            head = head or head_on(args.device)
            session.measure(head, part)
    print(f"{session.left:.0f} seconds are left. {args.output}: {', '.join(sorted(names_in(args.output)))}")


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder."""
    return [path.name for path in folder.iterdir()]


def print_intentions(session: Session, parts: Sequence[str], seconds: float, checking: float) -> None:
    """Print what will be done in which order, and how long it may take."""
    left, files = seconds - HEADS, session.files
    print(f"{seconds:.0f} seconds in all; results go to {files.folder}.")
    results = read_results(files.rows) if files.rows.exists() else Results({})
    waiting = gpu.missing(session.rows, results, session.again)
    for number, part in enumerate(parts, start=1):
        if part == "probes":
            left -= PROBE_SECONDS
            print(f"{number}. Probes: about {PROBE_SECONDS:.0f} s.")
        elif part == "checks":
            left -= min(checking, left)
            print(f"{number}. Tests marked gpu: at most {checking:.0f} s.")
        else:
            room = left - reserve(session, parts[number:], checking)
            chosen = choose_rows(session, part, waiting, [*MEASURED, *results.rows], room)
            waiting = [row for row in waiting if row not in chosen]
            left -= sum(map(session.plans.seconds, chosen))
            print(f"{number}. Rows of {part} that fit, by a guess:")
            for row in chosen:
                is_planned = row.name in session.plans.rows or row.kind in (*CACHING, LOADING)
                ahead = "" if is_planned else ", not planned ahead"
                print(f"   {row.name}: about {session.plans.seconds(row):.0f} s{ahead}")
            if part in LISTS:
                for row in of_list(part, waiting):
                    print(f"   {row.name}: waits for another command")
    print(f"{len(waiting)} others wait for another command; {left:.0f} s are left over.")


def choose_rows(
    session: Session, part: str, waiting: Sequence[Row], known: Sequence[str], left: float
) -> list[Row]:
    """Return the rows of a part that fit into the seconds that are left, by a guess, in their order."""
    candidates = [row for row in waiting if row.is_goal] if part == "goals" else of_list_or_all(part, waiting)
    chosen: list[Row] = []
    while True:
        fitting = [row for row in candidates if row not in chosen and session.plans.seconds(row) <= left]
        if part == "rows":
            row = next_row(fitting, [*known, *(row.name for row in chosen)], session.plans.seconds)
        else:
            row = next(iter(fitting), None)
        if row is None:
            return chosen
        chosen.append(row)
        left -= session.plans.seconds(row)


def of_list_or_all(part: str, rows: Sequence[Row]) -> list[Row]:
    """Return the rows that a part lists, or all of a part without a list."""
    return of_list(part, rows) if part in LISTS else list(rows)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
