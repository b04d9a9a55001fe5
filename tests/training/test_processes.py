"""Device, precision and processes."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env

from modules.errors import OptionError
from tests.commands import QUIET, ROOT, run_python
from tests.training.toy import ToyFamily, toy_options, write_caches
from training.processes import make_accelerator
from training.run import train_network
from training.run_options import AcceleratorOptions

SHARE = """
import torch
from training.processes import make_accelerator
from training.run_options import AcceleratorOptions
from training.processes import reduce_max
accelerator = make_accelerator(AcceleratorOptions.from_defaults(ddp_timeout=5))
total = torch.tensor([float(accelerator.process_index + 1)])
torch.distributed.all_reduce(total)
# as --blocks_to_swap auto is agreed on
blocks = reduce_max(10 * accelerator.process_index, 2, accelerator.device)
print(accelerator.num_processes, torch.distributed.get_backend(), total.item(), blocks)
"""


@pytest.fixture(autouse=True)
def _fresh_processes() -> Iterator[None]:
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_half_precision_on_a_cpu_is_one_clear_error() -> None:
    with pytest.raises(OptionError, match="--mixed_precision fp16"):
        make_accelerator(AcceleratorOptions.from_defaults(mixed_precision="fp16"))


PLAIN = AcceleratorOptions.from_defaults()
DEFAULT = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
CONFIG = ("--use_parallelism_config",)
LAUNCHED = {  # options of the launcher -> what it asks for, and what does it here
    ("--use_fsdp",): ("accelerate's FSDP", "--shard_base"),
    ("--use_megatron_lm",): ("Megatron-LM (tensor and pipeline parallelism)", "--shard_base"),
    (*CONFIG, "--parallelism_config_tp_size", "2"): ("tensor parallelism", "--shard_base"),
    (*CONFIG, "--parallelism_config_cp_size", "2"): ("ring attention", "--context_parallel N"),
    (*CONFIG, "--parallelism_config_sp_size", "2"): ("sequence parallelism", "--context_parallel N"),
    CONFIG: ("a parallelism config", "--shard_base"),
}


@pytest.mark.parametrize("words", LAUNCHED)
def test_a_launcher_that_would_split_the_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, words: Sequence[str]
) -> None:
    """Also without the package that would split: accelerate ends in a traceback."""
    given = launch_command_parser().parse_args([*DEFAULT, *words, "script.py"])
    for name, value in prepare_multi_gpu_env(given).items():
        if "ACCELERATE_USE" in name or "PARALLELISM" in name:
            monkeypatch.setenv(name, value)
    name, ours = LAUNCHED[tuple(words)]
    with pytest.raises(OptionError, match=rf"asks for .*{re.escape(name)}.* pass {ours}"):
        make_accelerator(PLAIN)


def test_deepspeed_is_refused_unless_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, is_asked in (("true", True), ("1", True), ("false", False)):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", value)
        with pytest.raises(OptionError, match=r"DeepSpeed .*--shard_base") if is_asked else nullcontext():
            make_accelerator(PLAIN)


@pytest.mark.parametrize(
    ("processes", "group_size", "steps"),
    [
        (1, 1, "5 steps"),
        (4, 1, "2 steps of 4 batches"),
        (4, 2, "3 steps of 2 batches"),
        (4, 4, "5 steps"),
        (1, 2, "5 steps"),  # checked without a launcher: as one group
    ],
)
def test_check_counts_processes_that_share_tokens_as_the_run_does(
    processes: int,
    group_size: int,
    steps: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_caches(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    options = toy_options(tmp_path, "--check", "--context_parallel", group_size)

    assert train_network(ToyFamily(), options) == 0

    assert f"An epoch: 5 items with repeats, 5 batches, {steps}\n" in capsys.readouterr().out


@pytest.fixture
def backends() -> Iterator[None]:
    """Torch's switches are as before again afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    yield
    cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "2"), ("LOCAL_RANK", "9")])
def test_a_launchers_variable_without_a_rank_is_refused_by_name(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=f"has {name}={value}, but no RANK"):
        make_accelerator(AcceleratorOptions())


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("is_on", [False, True])
def test_tf32_and_the_search_for_fast_convolutions_are_switched_on_if_asked_for(is_on: bool) -> None:
    make_accelerator(AcceleratorOptions.from_defaults(cuda_allow_tf32=is_on, cuda_cudnn_benchmark=is_on))

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    assert (cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32) == (is_on, is_on, is_on)


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("is_on", [False, True])
def test_accelerate_does_not_change_how_exact_float32_is(
    monkeypatch: pytest.MonkeyPatch, is_on: bool
) -> None:
    def on_a_gpu(**settings: Any) -> Accelerator:
        # what it does with CUDA, --mixed_precision no and a launcher that was told --dynamo_backend
        torch.backends.cuda.matmul.allow_tf32 = True
        return Accelerator(**settings)

    monkeypatch.setattr("training.processes.Accelerator", on_a_gpu)
    make_accelerator(AcceleratorOptions.from_defaults(cuda_allow_tf32=is_on))

    assert torch.backends.cuda.matmul.allow_tf32 is is_on


@pytest.mark.parametrize(("asked", "minutes"), [(None, 24 * 60), (5, 5)])
def test_processes_wait_for_one_that_makes_samples(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, minutes: int
) -> None:
    given: list[timedelta] = []

    def watched(kwargs_handlers: list[Any], **settings: Any) -> Accelerator:
        given.extend(each.timeout for each in kwargs_handlers)
        return Accelerator(kwargs_handlers=kwargs_handlers, **settings)

    monkeypatch.setattr("training.processes.Accelerator", watched)
    make_accelerator(AcceleratorOptions.from_defaults(ddp_timeout=asked))

    assert given == [timedelta(minutes=minutes)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_fp16_sums_on_a_cpu_are_ignored_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    make_accelerator(AcceleratorOptions.from_defaults(fp16_accumulation=True))

    assert "--fp16_accumulation is ignored because" in caplog.text
    assert "gradients are less exact" not in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
@pytest.mark.parametrize("name", ["cuda_allow_tf32", "cuda_cudnn_benchmark", "ddp_timeout"])
def test_options_of_gpus_and_of_several_processes_say_that_they_do_nothing(
    name: str, backends: None, caplog: pytest.LogCaptureFixture
) -> None:
    make_accelerator(AcceleratorOptions.from_defaults(**{name: 5 if name == "ddp_timeout" else True}))
    (line,) = [message for message in caplog.messages if f"--{name}" in message]
    assert re.search("is ignored because .* computes on cpu|has no effect with one process", line)

    caplog.clear()
    make_accelerator(AcceleratorOptions.from_defaults())
    assert name not in caplog.text


def run_two(code: str, *words: object, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """Run code as both processes of a launcher."""
    base = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    base |= {"MASTER_PORT": str(20000 + os.getpid() % 20000), **environment}
    command = [sys.executable, "-c", code, *map(str, words)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(command, env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    codes = [process.returncode for process in processes]
    return [
        subprocess.CompletedProcess(command, code, *texts) for code, texts in zip(codes, said, strict=True)
    ]


@pytest.mark.slow
def test_two_processes_on_a_cpu_meet_through_gloo() -> None:
    assert [done.stdout.split() for done in run_two(SHARE)] == [["2", "gloo", "3.0", "10"]] * 2


SCRIPT = """
import os, signal, sys
from pathlib import Path
from modules.command import command_line
from tests.training.toy import ToyFamily, toy_options
from training.run import train_network

def watch(passes):
    if passes == 4 and os.environ["RANK"] == os.environ["TOY_KILLED"]:
        os.kill(os.getpid(), signal.SIGKILL)

def main():
    saving = ["--save_every_n_steps", 2, "--save_state", "--max_train_steps", 50]
    options = toy_options(Path(sys.argv[1]), *saving)
    train_network(ToyFamily(watch=watch), options)

command_line(main)
"""

REJECTED = """
from modules.command import command_line
from modules.errors import OptionError

def main():
    raise OptionError("--x 3: pass 4")

command_line(main, needs_packages=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
@pytest.mark.skipif(os.name == "nt", reason="processes meet through gloo, and are killed by a signal")
def test_a_killed_process_is_told_in_one_message_with_the_command_that_goes_on(
    tmp_path: Path, killed: int
) -> None:
    write_caches(tmp_path)

    done = run_two(SCRIPT, tmp_path, TOY_KILLED=str(killed))

    survivor = done[1 - killed]
    assert done[killed].returncode == -9
    assert survivor.returncode == 1
    assert "Traceback" not in survivor.stderr
    assert survivor.stderr.count("LostProcessError: ") == 1
    assert f"process {killed} (counted from 0) was lost" in survivor.stderr
    assert "--resume latest-or-fail" in survivor.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="torchrun ends processes by a signal")
def test_an_error_that_all_processes_have_is_told_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(REJECTED, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]

    done = run_python(*launch, script, environment={"PYTHONPATH": str(ROOT)}, check=False)

    assert done.returncode != 0
    assert done.stderr.count("OptionError: --x 3: pass 4") == 1
