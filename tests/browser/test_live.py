"""The page in a real browser, beside a training that takes a step whenever the test lets it."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from browser.jobs.jobs import open_queue
from tests.browser.serving import Served, serve_runs, write_run
from tests.chromium import open_page, wait_until
from tests.training.toy import ToyFamily, toy_options, toy_parser, write_caches, write_prompts
from tests.waiting import MILLISECONDS, PATIENCE
from training.next_commands import TrainingCommand
from training.options import list_script_options
from training.reports.history import History, describe_process
from training.run import train_network
from training.training_run import CHECK_INTERVAL

STEPS = 90
# what moved without a click, and by how much
WATCH_SHIFTS = """() => {
  window.shifts = [];
  const note = ({value, hadRecentInput, sources}) => {
    if (!hadRecentInput) shifts.push([value, ...sources.map(({node}) => node?.outerHTML?.slice(0, 60))]);
  };
  new PerformanceObserver(list => list.getEntries().forEach(note)).observe({type: "layout-shift"});
}"""
PROMPTS = "a cat --w 32 --h 32 --f 9 --d 11 --s 2\na dog --w 32 --h 32 --f 17 --d 12 --s 2\n"


@dataclass
class SteppedTraining:
    """A training in a thread of its own that waits before each step."""

    folder: Path
    gate: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    steps: int = 0  # that have begun
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        write_caches(self.folder)
        words = ["--sample_prompts", write_prompts(self.folder, PROMPTS), "--sample_at_first", "--sample_now"]
        words += ["--sample_every_n_steps", 30, "--max_train_steps", STEPS]
        options = toy_options(self.folder, *words, has_page=True)
        script_options = list_script_options(toy_parser(full_dit=False), options)
        self.thread = threading.Thread(
            target=train_network,
            args=(ToyFamily(watch=self._wait), options),
            kwargs={"command": TrainingCommand(script_options=script_options)},
        )
        self.thread.start()

    def _wait(self, _: int) -> None:
        self.gate.acquire(timeout=120)
        self.steps += 1

    def step_until(self, is_true: Callable[[], Any], maximum: int) -> None:
        """Take steps, `maximum` at most, until something is true."""
        for _ in range(maximum):
            if is_true():
                return
            self.gate.release()
            self.thread.join(0.2)
        for _ in range(300):  # what a step leads to may take a while, on a machine that is busy
            if is_true():
                return
            self.thread.join(0.2)
        assert is_true()

    def finish(self) -> None:
        for _ in range(STEPS):
            self.gate.release()
        self.thread.join(60)


@pytest.fixture
def training(tmp_path: Path) -> Iterator[SteppedTraining]:
    training = SteppedTraining(tmp_path)
    yield training
    training.finish()


@pytest.fixture
def served(training: SteppedTraining) -> Iterator[Served]:
    with serve_runs(training.folder) as served:
        yield served


def test_a_run_appears_grows_samples_when_asked_and_stops(training: SteppedTraining, served: Served) -> None:
    history = training.folder / "output" / "x-history.jsonl"
    while not history.exists():
        training.thread.join(0.1)
    with open_page(f"{served.url}/") as page:
        page.click("text=x")
        page.wait_for_selector("#deeds .status >> text=/training|sampling/")
        page.wait_for_selector('[aria-label="a cat, step 0"] video')
        points = "ask().then(() => plots[0]?.plot.data[0].length ?? 0)"
        training.step_until(lambda: page.evaluate(points) > 2, 25)
        page.evaluate(WATCH_SHIFTS)
        before = page.evaluate(points)
        training.step_until(lambda: page.evaluate(points) > before + 12, 25)
        assert page.evaluate("shifts") == []
        page.click("text=Sample now")
        while not (training.folder / "output" / "x.sample").exists():
            training.thread.join(0.05)
        training.thread.join(CHECK_INTERVAL)  # then the run looks at its folder again
        samples, asked = training.folder / "output" / "sample", range(training.steps, training.steps + 3)
        training.step_until(lambda: any([*samples.glob(f"x_{step:06d}_01*.mp4")] for step in asked), 2)
        page.evaluate("ask()")
        page.wait_for_selector(
            f"th:text-matches('step ({'|'.join(map(str, asked))})$')", timeout=PATIENCE * MILLISECONDS
        )
        training.thread.join(CHECK_INTERVAL)
        page.evaluate("window.confirm = () => true")
        page.click("#stop")
        # the steps that are left come only after the request, which the page sends when it can
        while training.thread.is_alive() and not (training.folder / "output" / "x.stop").exists():
            training.thread.join(0.05)
        training.thread.join(CHECK_INTERVAL)
        training.step_until(lambda: not training.thread.is_alive(), 2)
        page.evaluate("ask()")
        page.wait_for_selector("#deeds .status.stopped", timeout=PATIENCE * MILLISECONDS)
        wait_until(page, "!document.querySelector('button[value=sample]')")  # the parts come one by one
        assert page.problems == []


@pytest.mark.slow
def test_clips_play_in_step_and_two_lie_over_each_other(training: SteppedTraining, served: Served) -> None:
    training.finish()
    with open_page(f"{served.url}{served.of('x')}") as page:
        times = "[...document.querySelectorAll('.grid tbody:last-child video')].map(clip => clip.currentTime)"
        page.locator(".grid").scroll_into_view_if_needed()
        wait_until(page, f"{times}.length > 2 && Math.min(...{times}.slice(0, 3)) > 0")
        wait_until(page, f"(now => Math.max(...now) - Math.min(...now) < 0.2)({times}.slice(0, 3))")
        page.click("#play")
        page.evaluate("$('scrub').value = 0.5; $('scrub').dispatchEvent(new Event('input', {bubbles: true}))")
        wait_until(page, f"new Set({times}.slice(0, 3).map(time => time.toFixed(2))).size === 1")
        wait_until(page, "document.querySelector('.grid video').paused")

        page.locator(".grid td a").nth(2).click()
        page.get_by_label("lay another one over it").check()
        box = page.locator("#line").bounding_box()
        page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)

        clip = page.evaluate("document.querySelector('.pair .b').style.clipPath")
        assert 15 < float(clip.split()[-1].rstrip("%)")) < 35
        assert page.eval_on_selector_all("#left option, #right option", "all => all.length") == 8
        page.keyboard.press("Escape")
        page.locator(".grid td a").first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        label = "document.activeElement.querySelector('[data-src]').getAttribute('aria-label')"
        assert page.evaluate(label) == "a dog, step 30"
        assert page.problems == []


@pytest.mark.slow
def test_curves_of_several_runs_share_a_plot_and_a_part_of_them_is_shown(tmp_path: Path) -> None:
    for name in "xyz":
        write_run(tmp_path, name, 10)
    with serve_runs(tmp_path) as served, open_page(f"{served.url}{served.of('x')}") as page:
        for name in "yz":
            wait_until(page, "plots.length > 1")
            page.select_option("#with", label=name)
        labels = "plots[0].plot.series.map(one => one.label)"
        wait_until(page, f"{labels}.includes('z: loss')")
        assert page.evaluate(labels) == ["step", *(f"{name}: loss" for name in "xyz")]

        page.locator("#plots .u-over").first.scroll_into_view_if_needed()
        box = page.locator("#plots .u-over").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.28, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.72, box["y"] + 60, steps=4)
        page.mouse.up()
        wait_until(page, "JSON.stringify([...plots[0].plot.data[0]]) === '[4,5,6,7]'")
        page.select_option("#part", label="last half")  # what fingers can do
        wait_until(page, "JSON.stringify([...plots[0].plot.data[0]]) === '[5,6,7,8,9,10]'")
        page.check("#log")
        assert page.evaluate("plots.map(one => one.plot.scales.y.distr)") == [3, 3, 1]
        assert page.problems == []


@pytest.mark.slow
def test_no_chart_lies_over_another_at_any_width_and_a_curve_keeps_its_colour(tmp_path: Path) -> None:
    for name in ("x", "a_name_that_is_far_longer_than_any_chart_of_a_page_is_wide_" * 2):
        write_run(tmp_path, name, 10)
    figures = """[...document.querySelectorAll('#plots figure')].map((figure) => {
        const outer = figure.getBoundingClientRect();
        const canvas = figure.querySelector('canvas').getBoundingClientRect();
        return [outer.left, outer.right, canvas.left, canvas.right, document.documentElement.clientWidth];
    })"""
    with serve_runs(tmp_path) as served, open_page(f"{served.url}{served.of('x')}", width=1440) as page:
        wait_until(page, "plots.length > 1")
        inks = "plots[0].plot.series.slice(1).map(one => one.stroke())"
        alone = page.evaluate(inks)
        for width in (1440, 360, 412, 768, 860, 1024, 1280, 1920, 2560):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(100)
            for left, right, canvas_left, canvas_right, room in page.evaluate(figures):
                assert left - 1 <= canvas_left < canvas_right <= right + 1 <= room + 1
        page.select_option("#with", index=1)
        wait_until(page, f"{inks}.length === 2")
        assert page.evaluate(inks) == alone * 2
        assert page.evaluate("plots[0].plot.series.slice(1).map(one => one.dash)") == [[], [6, 4]]
        legends = "[...document.querySelectorAll('.u-legend')].map(one => one.innerText)"
        assert not any("--" in legend or legend.endswith(":") for legend in page.evaluate(legends))
        assert page.problems == []


@pytest.mark.slow
def test_commands_are_copied_without_a_secure_context_and_put_into_the_queue(tmp_path: Path) -> None:
    history = write_run(tmp_path / "output", "x", 6, "", changed=[["output_dir", "output"]])
    line = "python wan_train_network.py --output_dir output --output_name x"
    with history.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 6, "commands": [["Go on", line, line, ""]]}) + "\n")
    with serve_runs(tmp_path) as served, open_page(f"{served.url}{served.of('x')}") as page:
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        page.evaluate(
            "document.addEventListener('copy', () => { window.copied = getSelection().toString() })"
        )
        page.click("text=Copy")
        wait_until(page, "document.querySelector('.copy').textContent === 'Copied'")
        assert page.evaluate("window.copied") == line
        page.click("text=Put it into the queue")
        page.wait_for_selector("text=--dataset_config is missing")  # the script's own words
        page.evaluate(f"document.querySelector('[name=line]').value = '{line} --help'")
        page.click("text=Put it into the queue")
        page.wait_for_selector("text=It is in the queue")
        jobs = open_queue(served.runs, read_only=True).jobs()
        assert [(job.line, job.folder) for job in jobs] == [(f"{line} --help", str(tmp_path))]


@pytest.mark.slow_cases("told1", "told2", "told3", "told4")
@pytest.mark.parametrize(
    "told",
    [
        {"process": {"machine": 1, "number": 2, "born": 3}},
        {"changed": [["output_dir", "another"]]},
        {"changed": [["output_dir", "/output"]]},
        {"changed": []},
        {"written_in": "/output"},
    ],
)
def test_a_command_that_another_machine_or_folder_wrote_is_read_before_it_is_queued(
    tmp_path: Path, told: dict[str, Any]
) -> None:
    history = write_run(tmp_path / "output", "x", 6, "", **{"changed": [["output_dir", "output"]], **told})
    line = "python convert_lora.py --input \u202ea --help"
    with history.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 6, "commands": [["Go on", line, line, ""]]}) + "\n")
    with serve_runs(tmp_path) as served, open_page(f"{served.url}{served.of('x')}", width=360) as page:
        queue = open_queue(served.runs, read_only=False)
        assert page.get_by_text("Put it into the queue", exact=True).count() == 0
        page.click("text=Read it, then add it to the queue")
        page.wait_for_selector("#words")
        assert page.input_value("#words") == line.replace("\u202e", r"\u202e")
        assert "x in" in page.inner_text("form.add .note >> nth=0")
        page.fill("#words", "bash x")
        page.click("text=/^Add$/")
        page.wait_for_selector("#said >> text=/bash.* is not a command/")
        page.click("text=Start the queue")  # it stands in what the buttons change
        page.click("text=Pause the queue")
        assert page.input_value("#words") == "bash x"
        assert queue.jobs() == []
        page.fill("#words", "python convert_lora.py --help")
        page.click("text=/^Add$/")
        page.wait_for_selector("text=Added: it waits above.")
        assert [(job.line, job.folder) for job in queue.jobs()] == [
            ("python convert_lora.py --help", str(history.parent))
        ]
        assert page.locator("[name=run]").count() == 0
        assert [error for error in page.problems if "422" not in error] == []


def test_a_command_that_lacks_a_file_is_not_queued_as_if_it_were_whole(tmp_path: Path) -> None:
    history = write_run(tmp_path / "output", "x", 6, "", changed=[["output_dir", "output"]])
    line = "python wan_generate_video.py --vae VAE_FILE --save_path output/generated"
    told = ["Generate with it", line, line, "Fill in VAE_FILE first: the run does not know this.", "VAE_FILE"]
    with history.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 6, "commands": [told]}) + "\n")
    with serve_runs(tmp_path) as served, open_page(f"{served.url}{served.of('x')}") as page:
        assert page.get_by_text("Put it into the queue", exact=True).count() == 0
        assert "Fill in VAE_FILE first" in page.inner_text(".command")
        page.click("text=Fill in what is missing, then add it to the queue")
        page.wait_for_selector("#words")
        assert page.input_value("#words") == line


@pytest.mark.slow
def test_a_sample_that_cannot_be_shown_says_so_and_the_newest_is_in_view(tmp_path: Path) -> None:
    history = History(write_run(tmp_path, "x", 6).parent / "y-history.jsonl", 2)
    started = {"model": "wan", "total_steps": 90, "changed": [], "unchanged": [], "listens": True}
    history.add(0, started={**started, "process": describe_process()})
    for step in range(1, 60):
        names = {"0": f"y_{step}.png" if step % 2 else f"y_{step}.mp4"}
        history.add(step, samples=f"{step:06d}", files=names, prompts={"0": "a cat"})
        history.add(step, level="info", message=f"message {step}")
    history.flush()
    with serve_runs(tmp_path) as served, open_page(f"{served.url}{served.of('y')}", width=390) as page:
        page.get_by_label("all 59 steps").check()
        wait_until(page, "document.querySelector('.grid').parentElement.scrollLeft > 1000")
        rest = "(log => log.scrollHeight - log.scrollTop - log.clientHeight)(document.querySelector('.log'))"
        assert page.evaluate(rest) < 40
        page.locator(".grid").scroll_into_view_if_needed()
        page.wait_for_selector("text=/This browser cannot show y_59.png: it is gone/")
