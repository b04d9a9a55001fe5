"""Runs whose processes share the transformer, from the command lines of the families: their files are those
of runs in which each process has all of it, to the bit.
"""

import re
import sys
from collections.abc import Collection, Iterable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from modules.media.reading import video_frames
from tests.commands import ROOT, run_in_processes, run_script
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.families import FAMILIES, TinyFamily, write_deep
from tests.tiny.project import write_dataset
from tests.tiny.wan_dit import tiny_state, write_dit
from tests.training.toy import same

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries")

DEFAULT = "wan t2v-1.3B"
UNET_ONLY = "--network_train_unet_only"
OTHERS = [family.name for family in FAMILIES if family.name != DEFAULT]
RUN = (
    *("--output_name", "x", "--seed", "1", "--max_data_loader_n_workers", "0", "--no_page"),
    *("--learning_rate", "1e-2", "--max_train_steps", "3"),
)


class Shared:
    """A project of a family, and its runs in several processes."""

    def __init__(self, name: str, folder: Path, trains: bool = True, caches_texts: bool = True) -> None:
        self.family: TinyFamily = next(one for one in FAMILIES if one.name == name)
        self.folder = folder
        if name == DEFAULT:
            write_deep(self.family, folder)
            write_dit(folder / "model", tiny_state("t2v", num_layers=4, seed=1), name="dit_high")
            write_dataset(folder, frames="5")
        else:
            self.family.prepare(folder)
        (folder / "prompts.txt").write_text(
            f"{self.family.sample_line}\n{self.family.sample_line} --s 3 --d 8\n", encoding="utf-8"
        )
        if trains:
            succeed_here(*self.family.cache_latents, folder=folder)
        if trains and caches_texts:
            succeed_here(*self.family.cache_texts, folder=folder)

    @property
    def train_full(self) -> list[str]:
        """Return the command that trains the transformer itself."""
        models = self.family.train[1 : self.family.train.index("--network_module")]
        return [self.family.train_full, *models]

    def run(self, processes: int, output: str, *words: object, is_full: bool = False) -> None:
        """Train a LoRA, or the transformer."""
        default = self.train_full if is_full else self.family.train
        command = (*default, *RUN, "--output_dir", output, *words)
        if processes == 1:
            succeed_here(*command, folder=self.folder)
        else:
            run_in_processes(processes, *command, folder=self.folder)

    def train(self, output: str, processes: int, *words: object, is_full: bool = False) -> dict[str, Tensor]:
        """Return the tensors of the LoRA, or of the transformer."""
        self.run(processes, output, *words, is_full=is_full)
        return load_file(self.folder / output / "x.safetensors")


def scalars(folder: Path) -> dict[str, list[float]]:
    """Return all validation losses that a run has logged."""
    (log,) = folder.rglob("*tfevents*")
    events = EventAccumulator(str(log.parent)).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("validation")]
    return {name: [event.value for event in events.Scalars(name)] for name in names}


def frames_in(folder: Path) -> Tensor:
    """Return the frames of all clips in a folder, by the order of their names: N F H W 3."""
    clips = [list(video_frames(path)) for path in sorted(folder.glob("*.mp4"))]
    return torch.from_numpy(numpy.array(clips))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(DEFAULT, tmp_path_factory.mktemp("two cards"))


WAYS = {
    "plain": (),
    "dora": ("--network_args", "dora_wd=True"),
    "fp8": ("--fp8_base", "--fp8_scaled"),
    "dora fp8": ("--fp8_base", "--network_args", "dora_wd=True"),
    "checkpointing": ("--gradient_checkpointing", "--gradient_checkpointing_cpu_offload"),
    "bf16": ("--mixed_precision", "bf16", "--gradient_checkpointing"),
    "module dropout": ("--network_args", "module_dropout=0.93"),
    "loha": ("--network_module", "networks.loha"),
    "lokr": ("--network_module", "networks.lokr", "--network_args", "factor=4"),
    "compiled": ("--compile", "--gradient_checkpointing", "--max_train_steps", "1"),
    "int8": ("--convrot_int8", "--convrot_int8_bwd", "int8", "--network_module", "networks.lokr"),
    "dora nf4": ("--nf4_base", "--network_args", "dora_wd=True", "--gradient_checkpointing"),
}


def with_slow(ways: Iterable[str], daily: Collection[str]) -> list[Any]:
    """Return the ways as cases; those beside `daily` are slow."""
    return [way if way in daily else pytest.param(way, marks=pytest.mark.slow) for way in ways]


@pytest.mark.parametrize("way", with_slow(WAYS, {"dora fp8"}))
def test_the_lora_is_that_of_whole_models(project: Shared, way: str) -> None:
    expected = project.train(f"{way} whole", 2, *WAYS[way])

    assert same(project.train(f"{way} shared", 2, "--shard_base", *WAYS[way]), expected)


@pytest.mark.slow
def test_an_odd_number_of_batches_samples_and_validation_are_those_of_whole_models(project: Shared) -> None:
    """Of three micro-batches the second process lacks one in each epoch, and it has no clip to validate."""
    words = (
        *("--gradient_accumulation_steps", "2", "--validation_split", "0.25", "--save_state"),
        *("--validate_every_n_steps", "1", "--logging_dir", "logs", "--gradient_checkpointing"),
        *("--sample_prompts", "prompts.txt", "--sample_every_n_steps", "2", "--sample_at_first"),
    )
    full = project.train("odd whole", 2, *words, "--logging_dir", "odd whole/logs")
    logs = "--logging_dir", "odd shared/logs"

    assert same(project.train("odd shared", 2, "--shard_base", *words, *logs), full)

    ours, theirs = (project.folder / f"odd {name}" for name in ("shared", "whole"))
    assert len(frames_in(ours / "sample")) == 4  # each once
    assert torch.equal(frames_in(ours / "sample"), frames_in(theirs / "sample"))
    assert scalars(ours / "logs") == scalars(theirs / "logs")


FULL = [family.name for family in FAMILIES if family.train_full]


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_a_whole_transformer_that_is_split_is_that_of_one_process(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """To the order of sums: gradients of what all blocks are given, as texts, are summed in each block first.

    What a resumed run saves is equal to the bit. Samples are made on the way.
    """
    project = Shared(name, tmp_path_factory.mktemp("two cards"))
    words = ("--optimizer_type", "SGD", "--max_train_steps", 2)
    more = ("--gradient_checkpointing", "--shard_base", "--sample_prompts", "prompts.txt", "--save_state")
    more += ("--sample_every_n_steps", 1, "--save_every_n_steps", 1)
    expected = project.train("whole", 1, *words, "--gradient_accumulation_steps", 2, is_full=True)

    found = project.train("split", 2, *words, *more, is_full=True)
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-6)
    resume = ("--resume", "split/x-step00000001-state")
    assert same(project.train("resumed", 2, *words, *more, *resume, is_full=True), found)


@pytest.mark.slow
def test_a_run_is_resumed_by_another_number_of_processes(project: Shared) -> None:
    def train(output: str, *shares: str) -> dict[str, Tensor]:
        default = ("--validation_split", "0.25", "--save_state", "--overwrite")
        resume = ("--resume", f"{output}/x-state")
        project.train(output, 2, *default, *shares, "--max_train_steps", 1)
        project.train(output, 1, *default, *resume, "--gradient_accumulation_steps", 2)
        return project.train(output, 2, *default, *shares, *resume, "--max_train_steps", 5)

    assert same(train("resumed shared", "--shard_base"), train("resumed whole"))


SIZE = ("--video_size", "32", "32", "--infer_steps", "3", "--guidance_scale", "3", "--seed", "5")


def generate(
    project: Shared, output: str, processes: int, *words: object, by: Sequence[object] = ("--shard_base",)
) -> list[Tensor]:
    """Return the latents of all that is made. by: how several processes share the work."""
    command = (*project.family.generate, *SIZE, "--output_type", "latent", "--save_path", output, *words)
    if processes == 1:
        succeed_here(*command, folder=project.folder)
    else:
        first, *others = run_in_processes(processes, *command, *by, folder=project.folder)
        assert all("INFO" not in one.stderr + one.stdout for one in others)  # the first one talks
        has_encoder = project.family.name != "hidream_o1"
        split = 1 + has_encoder + ("--dit_high_noise" in words)  # the text encoder, and each transformer
        found = len(re.findall("blocks of .* are split over", first.stderr))
        assert found == (split if "--shard_base" in by else 0)
    paths = (project.folder / output).glob("*.safetensors")
    # by time: their names begin with the second, and end with words if that name is taken
    return [load_file(path)["latent"] for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]


TEACACHE = ("--teacache_threshold", "0.5", "--teacache_coefficients", "1", "0", "--infer_steps", "6")
GENERATIONS = {
    "prompt": ("--prompt", "a cat"),
    "fp8": ("--prompt", "a cat", "--fp8_scaled"),
    "file": ("--from_file", "prompts.txt", "--output_type", "both"),
    "skipped layers": ("--prompt", "a cat", "--slg_mode", "original", "--slg_layers", "1"),
    "teacache": ("--prompt", "a cat", *TEACACHE),
}


@pytest.mark.parametrize("way", with_slow(GENERATIONS, {"file"}))
def test_a_generation_is_that_of_one_process(project: Shared, way: str) -> None:
    expected = generate(project, f"made {way} whole", 1, *GENERATIONS[way])

    found = generate(project, f"made {way} shared", 2, *GENERATIONS[way])

    assert len(found) == len(expected) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.slow
def test_the_first_process_alone_does_what_runs_no_transformer(project: Shared) -> None:
    """Also if it has to draw a seed, on which processes that run one agree."""
    generate(project, "to decode", 1, "--prompt", "a cat")
    (latents,) = (project.folder / "to decode").glob("*.safetensors")
    command = (*project.family.generate, *SIZE[:-2], "--shard_base", "--save_path", "alone")
    for words in (("--prompt", "a cat", "--plan", "24"), ("--latent_path", latents)):
        first, other = run_in_processes(2, *command, *words, folder=project.folder)
        assert "Error" not in first.stderr
        assert not other.stderr + other.stdout

    assert len(list((project.folder / "alone").glob("*.mp4"))) == 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Gemma encodes its captions while training, and learns."""
    project = Shared("lumina", tmp_path_factory.mktemp("two cards"), caches_texts=False)
    both = [word for word in project.family.train if word != UNET_ONLY]
    project.family = replace(project.family, train=both)
    return project


@pytest.mark.slow
@pytest.mark.parametrize("learns", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_training_that_encodes_captions_is_that_of_whole_models(pictures: Shared, learns: bool) -> None:
    """A text encoder that learns is in every process, the others are split: these encode for each in turn."""
    words = () if learns else (UNET_ONLY,)
    expected = pictures.train(f"live {learns} whole", 2, *words)

    assert same(pictures.train(f"live {learns} shared", 2, "--shard_base", *words), expected)


@pytest.mark.slow
def test_a_lora_is_added_to_a_text_encoder_that_is_split(pictures: Shared) -> None:
    lora = pictures.train("both", 1, "--max_train_steps", 1, "--learning_rate", 1)
    assert any(name.startswith("lora_te") for name in lora)
    words = ("--prompt", "a cat", "--lora_weight", "both/x.safetensors")
    (plain,) = generate(pictures, "without", 1, *words[:2])

    (full,), (shared,) = (generate(pictures, f"with {count}", count, *words) for count in (1, 2))

    assert torch.equal(full, shared)
    assert not torch.equal(full, plain)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", OTHERS)
def test_every_family_trains_and_generates_with_shared_blocks(
    name: str, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    project = Shared(name, tmp_path_factory.mktemp("cards"))
    step = ("--max_train_steps", 2)
    prompt = ("--prompt", "a cat")

    lora = project.train("whole", count, *step)
    assert same(project.train("shared", count, "--shard_base", *step), lora)
    full, shared = (generate(project, f"made {number}", number, *prompt) for number in (1, count))
    assert torch.equal(full[0], shared[0])


def test_blocks_in_8_bits_compute_the_same_with_every_kind_of_scale(tmp_path: Path) -> None:
    """Of all but blocks of a row with 8-bit products, which commands refuse on a CPU."""
    kinds = ("cast", "tensor", "rows", "blocks", "int8", "nf4")
    done = run_in_processes(2, "tests/runtime/offload/fp8_blocks.py", *kinds, folder=tmp_path)
    assert [one.stdout.splitlines() for one in done] == [[f"{kind} True True" for kind in kinds]] * 2


BOTH = (
    *("--task", "t2v-A14B", "--dit_high_noise", "model/dit_high.safetensors"),
    *("--timestep_boundary", "500"),
)


@pytest.mark.slow
@pytest.mark.parametrize("way", with_slow(("one network", "a network each"), {"one network"}))
def test_two_transformers_train_as_whole_ones(project: Shared, way: str) -> None:
    """At most places the batches of the processes are for different ones."""
    words = (*BOTH, "--gradient_accumulation_steps", "2")
    files = ["x.safetensors"]
    if way == "a network each":
        words, files = (*words, "--lora_per_expert"), ["x_low_noise.safetensors", "x_high_noise.safetensors"]
    for output, more in ((f"{way} whole", ()), (f"{way} shared", ("--shard_base",))):
        project.run(2, output, *words, *more)

    for file in files:
        full, shared = (load_file(project.folder / f"{way} {name}" / file) for name in ("whole", "shared"))
        assert same(shared, full)


@pytest.mark.slow
def test_two_transformers_generate_as_in_one_process(project: Shared) -> None:
    full, shared = (
        generate(project, f"experts {count}", count, "--prompt", "a cat", "--flow_shift", "1", *BOTH)
        for count in (1, 2)
    )

    assert torch.equal(full[0], shared[0])


@pytest.mark.slow
@pytest.mark.parametrize("by", ["--shard_base", "--cfg_parallel"])
def test_prompts_are_asked_for_once(project: Shared, by: str) -> None:
    """Lines come from standard input, which ends after them."""
    expected = generate(project, f"told {by}", 1, "--from_file", "prompts.txt")
    answers = project.folder / "answers.py"
    answers.write_text(ANSWERS.format(root=str(ROOT), script=project.family.generate[0]), encoding="utf-8")
    asking = replace(project.family, generate=[str(answers), *project.family.generate[1:]])
    asked = copy(project)
    asked.family = asking

    found = generate(asked, f"asked {by}", 2, "--interactive", by=(by,))

    assert len(found) == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


ANSWERS = """import io, os, runpy, sys
sys.path.insert(0, {root!r})
first = os.environ["RANK"] == "0"
sys.stdin = open("prompts.txt", encoding="utf-8") if first else io.StringIO("must not be read")
runpy.run_path(os.path.join({root!r}, {script!r}), run_name="__main__")
"""


REJECTED = {
    "swap": (("--blocks_to_swap", "1"), "--blocks_to_swap 1"),
    "input layers": (("--img_in_txt_in_offloading",), "--img_in_txt_in_offloading"),
    "foreign": (("--network_module", "lycoris.kohya"), "lycoris.kohya"),
    "turns": ((*BOTH, "--offload_inactive_dit"), "--offload_inactive_dit"),
}


@pytest.mark.parametrize("what", REJECTED)
def test_what_processes_cannot_share_is_refused_by_name(project: Shared, what: str) -> None:
    words, named = REJECTED[what]
    command = (*project.family.train, *RUN, "--output_dir", "refused", "--shard_base", *words)

    assert_one_message(*run_here(*command, folder=project.folder), "--shard_base", named)


def test_one_process_says_that_it_holds_the_model(project: Shared) -> None:
    said = succeed_here(
        *project.family.train, *RUN, "--output_dir", "alone", "--shard_base", folder=project.folder
    )
    assert "--shard_base has no effect with one process" in said


@pytest.mark.slow
def test_the_plan_counts_parts_for_two_processes(project: Shared) -> None:
    done = run_script(
        *project.family.train, *RUN, "--output_dir", "plan", "--shard_base", "--plan", folder=project.folder
    )
    assert "blocks split over 2 processes" in done.stdout


@pytest.mark.slow
def test_the_plan_of_a_generation_counts_parts_of_all_large_networks(project: Shared) -> None:
    command = (*project.family.generate, *SIZE, "--save_path", "plan", "--prompt", "a cat", "--plan", "24")
    said = run_script(*command, *BOTH, "--flow_shift", "1", "--shard_base", folder=project.folder).stdout
    assert said.count("blocks split over 2 processes") == 2  # the text encoder, and the transformer at work
    assert "idle experts" in said
