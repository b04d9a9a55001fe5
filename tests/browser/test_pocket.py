"""What the page says of real trainings: of the pocket model, in processes of their own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocket.measure import IN_FLOAT32, POCKET, model_options
from tests.browser.serving import Served, serve_runs
from tests.faults.runs import assert_same_end
from tests.faults.test_kill_and_resume import KILLED, Running, kill_after, start, wait_until
from tests.pocket.test_training import cached  # noqa: F401  # a fixture

LEARNER = (
    "--sdpa --network_module networks.lora_wan --network_dim 4 --learning_rate 1e-2 --seed 3 "
    "--timestep_sampling shift --discrete_flow_shift 3 --max_data_loader_n_workers 0 --output_name x "
    "--save_every_n_steps 2 --save_state --sample_now"
)


def command(cached: Path, output: Path, *words: object) -> Sequence[str]:  # noqa: F811
    data = ("--dataset_config", cached / "dataset.toml", "--sample_prompts", cached / "samples.txt")
    to = ("--output_dir", output)
    return [
        "wan_train_network.py",
        *map(str, (*model_options(POCKET), *IN_FLOAT32, *LEARNER.split(), *data, *to, *words)),
    ]


def start_until_saved(command: Sequence[str], output: Path, step: int) -> Running:
    """A training that has just saved at this step, and is at the next one."""
    output.mkdir()  # it is looked into by now
    process = start(output.parent, command, output.parent / "log")
    wait_until((output / f"x-step{step:08d}.safetensors").exists, process)
    assert process.poll() is None, (output.parent / "log").read_text(encoding="utf-8")
    return process


def tell(served: Served) -> tuple[str, str]:
    """The state of the run in the list, and how its page says that it stands."""
    page = served.ask(served.of("x")).text
    return served.runs.look()[0].state, page.partition('<p class="status">')[2].partition("</span>")[0]


def test_a_killed_run_has_died_and_resumed_it_ends_as_if_it_had_not(
    cached: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    whole, output, words = tmp_path / "whole", tmp_path / "out", ("--max_train_steps", 8)
    words = (*words, "--sample_every_n_steps", 4)
    assert start(tmp_path, command(cached, whole, *words), tmp_path / "log").wait(300) == 0
    process = start_until_saved(command(cached, output, *words), output, 4)
    with serve_runs(output) as served:
        assert tell(served)[0] == "running"
        assert kill_after(process, 0) == KILLED

        assert tell(served)[0] == "died"
        assert "died after step" in tell(served)[1]
        again = command(cached, output, *words, "--resume", "latest")
        assert start(tmp_path, again, tmp_path / "log").wait(300) == 0
        assert tell(served)[0] == "finished"
    assert_same_end(output, whole)


def test_a_run_that_is_asked_samples_within_two_steps_and_stops_with_all_saved(
    cached: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    text = (cached / "dataset.toml").read_text(encoding="utf-8")
    slow = text.replace("num_repeats = 4", "num_repeats = 32")  # an epoch is a step, of more than a second
    (tmp_path / "slow.toml").write_text(slow, encoding="utf-8")
    words = ("--gradient_accumulation_steps", 64, "--max_train_steps", 100)
    words += ("--dataset_config", tmp_path / "slow.toml")
    process = start_until_saved(command(cached, output, *words), output, 2)

    def told(kind: str) -> list[dict[str, Any]]:
        rows = (output / "x-history.jsonl").read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, rows) if kind in row]

    with serve_runs(output) as served:
        assert served.ask(served.of("x", "ask"), "POST", "what=sample", Origin=served.url).status == 204
        wait_until(lambda: bool(told("samples")), process)
        (sampled,) = told("samples")
        assert sampled["step"] <= 4
        (name,) = sampled["files"].values()
        assert served.ask(served.of("x", f"sample/{name}")).body[4:8] == b"ftyp"
        assert name in served.ask(served.of("x")).text

        assert served.ask(served.of("x", "ask"), "POST", "what=stop", Origin=served.url).status == 204
        assert process.wait(60) == 0
        (step,) = [row["step"] for row in told("ended")]
        assert step <= sampled["step"] + 2
        assert tell(served)[0] == "stopped"
        assert f"stopped after step {step}" in tell(served)[1]
        assert (output / f"x-step{step:08d}-state").is_dir()
