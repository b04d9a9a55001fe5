"""Frozen transformers in int8 and nf4 from the command line to files: training, resuming, generation."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.faults.messages import assert_one_message, run_here
from tests.test_fp8 import (
    CHOSEN,
    TEXTS_IN_FP8,
    apart,
    difference,
    generated,
    load_weights,
    with_dit,
)
from tests.test_shard_base import with_slow
from tests.tiny.dit_files import as_fp8
from tests.tiny.families import write_deep
from tests.tiny.runs import TinyProject, make_project

FORMS = {  # options in training, those in generation, the form's name, least cosine of the gradient
    "int8": (["--convrot_int8"], ["--convrot_int8"], "int8", 0.99),
    "both ways": (["--convrot_int8", "--convrot_int8_bwd", "int8"], ["--convrot_int8"], "int8", 0.99),
    "nf4": (["--nf4_base"], ["--nf4"], "nf4", 0.95),
}
# Anima's adapter, of random weights, is 4 bits narrow too, and all text goes through it; the random blocks of
# HiDream-O1-Image have no gates, and its LoRA reads the patches before them
# the factor that is 0 untrained, as sd-scripts and as ComfyUI name it
UP = ("lora_up.weight", "lora_B.weight")
LEAST = {("anima", "nf4"): 0.93, ("hidream_o1", "nf4"): 0.85}
EACH = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module", params=CHOSEN)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """With blocks enough to swap."""
    return make_project(request.param, tmp_path_factory.mktemp("small"), write_deep)


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Of all tensors together."""
    assert one.keys() == other.keys()
    left, right = (torch.cat([each[name].flatten().double() for name in other]) for each in (one, other))
    return float(left @ right / (left.norm() * right.norm()))


@pytest.mark.slow_cases("wan t2v-1.3B-int8", "wan t2v-1.3B-nf4")
@EACH
def test_the_gradient_has_nearly_the_direction_of_that_in_16_bits(project: TinyProject, form: str) -> None:
    """With plain gradient descent the factor `up` is after one step the gradient itself, times the rate."""
    how, _, name, minimum = FORMS[form]
    minimum = LEAST.get((project.family.name, form), minimum)
    one_step = ["--optimizer_type", "SGD", "--max_train_steps", "1", "--learning_rate", "1"]
    expected = project.train("plain", *one_step)
    found = project.train(form, *one_step, *how)

    ups = [{k: t for k, t in lora.items() if k.endswith(UP)} for lora in (found, expected)]
    assert found.keys() == expected.keys()
    assert minimum < cosine(*ups) < 1 - 1e-7
    with safe_open(project.folder / form / "x.safetensors", "pt") as file:
        assert file.metadata()["ss_base_form"] == name
        assert file.metadata()["ss_fp8_base"] == "False"


NETWORKS = {  # options of the network, ends of the names of what learns in the first step
    "LoRA": ([], UP),
    "LoHa": (["--network_module", "networks.loha"], ("hada_w2_a",)),
    "LoKr": (["--network_module", "networks.lokr"], ("lokr_w2", "lokr_w2_b")),
    "DoRA": (["--network_args", "dora_wd=True"], UP),
    "OFT": (["--network_module", "networks.oft"], ("oft_R.weight",)),
    "T-LoRA": (["--network_args", "tlora=True"], UP),
}


DAILY = {"LoHa int8", "LoKr nf4", "DoRA nf4"}


@pytest.mark.parametrize(
    "way", with_slow([f"{kind} {form}" for kind in NETWORKS for form in ("int8", "nf4")], DAILY)
)
def test_every_network_learns_on_small_forms_and_savers_of_memory_change_nothing(
    project: TinyProject, way: str
) -> None:
    kind, form = way.split()
    network, ends = NETWORKS[kind]
    one_step = ["--optimizer_type", "SGD", "--max_train_steps", "1", "--learning_rate", "1", *network]
    expected = project.train(f"{kind} plain", *one_step)
    found = project.train(way, *one_step, *FORMS[form][0])

    learning = [name for name in expected if name.endswith(ends)]
    assert learning
    some = [{name: each[name] for name in learning} for each in (found, expected)]
    minimum = LEAST.get((project.family.name, form), FORMS[form][3])
    assert minimum < cosine(*some) < 1 - 1e-7
    savers = ("--gradient_checkpointing", "--blocks_to_swap", "1")
    saved = project.train(f"{way} saved", *one_step, *FORMS[form][0], *savers)
    assert all(torch.equal(saved[name], tensor) for name, tensor in found.items())


@pytest.mark.slow_cases("wan t2v-1.3B-int8")
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_resumed_run_ends_with_equal_bytes(project: TinyProject, form: str) -> None:
    how = [*FORMS[form][0], "--mixed_precision", "bf16", "--gradient_checkpointing", "--blocks_to_swap", "1"]
    full = project.train(f"whole {form}", *how, "--save_state", "--save_every_n_steps", "2")

    resumed = project.train(f"resumed {form}", *how, "--resume", f"whole {form}/x-step00000002-state")

    assert all(torch.equal(resumed[name], tensor) for name, tensor in full.items())
    said = project.run(
        *project.family.train,
        *("--output_name", "x", "--seed", "1", "--max_data_loader_n_workers", "0", "--max_train_steps", "3"),
        *("--output_dir", f"other {form}", "--resume", f"whole {form}/x-step00000002-state"),
    )
    assert f"{FORMS[form][0][0]} was True when the state was saved" in said


@pytest.mark.slow_cases("wan t2v-1.3B-int8-0.1")
@pytest.mark.parametrize(("form", "maximum"), [("int8", 0.1), ("nf4", 0.5)])
def test_generation_makes_nearly_the_same(
    project: TinyProject, tmp_path: Path, form: str, maximum: float
) -> None:
    how = FORMS[form][1]
    expected, found = generated(project, tmp_path / "plain"), generated(project, tmp_path / form, *how)

    assert all(1e-4 < one < maximum for one in apart(found, expected))
    swapped = generated(project, tmp_path / "swapped", *how, "--blocks_to_swap", "1")
    assert max(apart(swapped, found)) == 0


def test_two_forms_and_files_in_fp8_are_refused_by_name(project: TinyProject, tmp_path: Path) -> None:
    default = ("--output_dir", "o", "--output_name", "x", "--max_train_steps", "1")
    for options in (["--convrot_int8", "--nf4_base"], ["--nf4_base", "--fp8_base"]):
        found = run_here(*project.family.train, *default, *options, folder=project.folder)
        assert_one_message(*found, options[0], options[1])
    save_file(as_fp8(load_weights(project), "fp8_scaled"), tmp_path / "dit.safetensors")
    released = with_dit(project, tmp_path / "dit.safetensors")
    found = run_here(*released.family.train, *default, "--convrot_int8", folder=project.folder)
    assert_one_message(*found, "--convrot_int8: ", "already in fp8")


# Clips of LTX-2 have 32 numbers here, as its VAE compresses most: there the errors of a prediction, an eighth
# of its norm in both streams, average out least. The mean of ten losses has the bound of all.
SINGLE_LOSS = {("ltx_2 with sound", "nf4"): 0.16}


@pytest.mark.slow_cases("wan t2v-1.3B-nf4-0.08")
@pytest.mark.parametrize(("form", "maximum"), [("int8", 0.03), ("nf4", 0.08)])
def test_losses_stay_near_those_in_16_bits(project: TinyProject, form: str, maximum: float) -> None:
    steps = ["--max_train_steps", "10", "--mixed_precision", "bf16", "--log_with", "tensorboard"]
    losses = []
    for name, how in (("plain", []), (form, FORMS[form][0])):
        folder = f"losses of {name} beside {form}"
        project.train(folder, *steps, "--learning_rate", "1e-3", "--logging_dir", f"{folder}/logs", *how)
        losses.append(read_losses(project.folder / folder / "logs"))

    assert len(losses[0]) == len(losses[1]) == 10
    for plain, stored in zip(*losses, strict=True):
        assert math.isclose(stored, plain, rel_tol=SINGLE_LOSS.get((project.family.name, form), maximum))
    assert math.isclose(sum(losses[1]), sum(losses[0]), rel_tol=maximum)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_text_encoders_are_kept_small_too_and_caches_of_theirs_made_anew(
    project: TinyProject, form: str, tmp_path: Path
) -> None:
    if project.family.name not in TEXTS_IN_FP8:
        pytest.skip("its text encoders are kept in 16 bits")
    in_fp8, key = TEXTS_IN_FP8[project.family.name]

    def texts() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path in sorted((project.folder / "cache").glob("*_te.safetensors")):
            tensors |= {f"{path.name} {name}": one for name, one in load_file(path).items() if key in name}
        return tensors

    before, cache = texts(), project.family.cache_texts
    project.run(*cache, "--text_encoder_form", form)
    after = texts()
    project.run(*cache)  # for the other tests of this project
    assert 1e-5 < difference(after, before) < (1 if form == "nf4" else 0.15)  # sharp attention, as in fp8
    found = run_here(*cache, "--text_encoder_form", form, in_fp8, folder=project.folder)
    assert_one_message(*found, in_fp8, "--text_encoder_form")


def read_losses(folder: Path) -> list[float]:
    (path,) = folder.glob("**/events*")
    events = EventAccumulator(str(path))
    events.Reload()
    return [event.value for event in events.Scalars("loss/current")]
