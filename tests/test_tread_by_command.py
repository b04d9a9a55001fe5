"""--tread through the commands that users type, on tiny models of video and picture families."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from runtime.planning import memory_plan
from tests.faults.messages import assert_one_message, run_here
from tests.tiny.families import family_called
from tests.tiny.runs import RUN, TinyProject, make_project
from tests.tiny.wan_dit import tiny_state, write_dit
from tests.training.toy import metadata_of, same

KINDS = [
    "wan t2v-1.3B",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("flux", "z_image", "krea2", "qwen_image", "anima")
    ),
]
EXACT = ("--learning_rate", "1e-2")
TREAD = ("--tread", "0.5", "--tread_blocks", "1", "-1")
SMALL = ("--gradient_checkpointing", "--blocks_to_swap", "1")


@pytest.fixture(scope="module", params=KINDS)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    return make_project(family_called(request.param), tmp_path_factory.mktemp("a project"))


def test_a_resumed_or_smaller_run_leaves_out_the_same_tokens(project: TinyProject) -> None:
    plain = project.train("plain", *EXACT)
    full = project.train("whole", *EXACT, *TREAD, "--save_state", "--save_every_n_steps", "2")

    assert not same(full, plain)
    resume = ("--resume", "whole/x-step00000002-state")
    assert same(project.train("resumed", *EXACT, *TREAD, *resume), full)
    assert same(project.train("checkpointed", *EXACT, *TREAD, "--gradient_checkpointing"), full)
    small = project.train("small", *EXACT, *TREAD, *SMALL)
    for name, tensor in full.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-3, atol=1e-5)
    metadata = metadata_of(project.folder / "whole" / "x.safetensors")
    assert metadata["ss_tread"] == "0.5"
    assert metadata["ss_tread_blocks"] == "1 -1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tread", "0"), "--tread"),
        (("--tread", "1"), "--tread"),
        (("--tread", "nan"), "--tread"),
        (("--tread", "half"), "--tread"),
        (("--tread", "0.5", "--tread_blocks", "1", "0"), "--tread_blocks 1 0: the model"),
        (("--tread", "0.5", "--tread_blocks", "1"), "pass the first and the last block"),
        (("--tread", "0.5", "--tread_blocks", "1", "99"), "blocks, from 0 to"),
        (("--tread", "0.5", "--tread_blocks", "1.5", "2"), "--tread_blocks"),
        (("--tread_blocks", "1", "-1"), "--tread"),
        (("--tread", "0.5", "--tread_blocks", "1", "-1", "--context_parallel", "2"), "--context_parallel 2"),
    ],
)
def test_a_mistake_is_told_in_one_message(project: TinyProject, words: Sequence[str], message: str) -> None:
    command = (*project.family.train, *RUN, "--output_dir", "wrong", *words)

    assert_one_message(*run_here(*command, folder=project.folder), message)


# beside hundreds of tokens of text, two of nine that pass by are less than the copies of all rows
LONG_TEXTS = {"flux", "z_image", "krea2", "qwen_image"}


@pytest.mark.slow
def test_a_plan_counts_the_tokens_that_take_part(
    project: TinyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The more pass by, the less is kept for the backward pass; a share of one token in 1000 is none."""
    plans: list[memory_plan.MemoryPlan] = []
    monkeypatch.setattr(memory_plan, "show", lambda plan, _: plans.append(plan))
    for share in ("0.001", "0.25", "0.5"):
        words = ("--tread", share, "--tread_blocks", "1", "-1", "--plan", "24")
        project.run(*project.family.train, *RUN, "--output_dir", "planned", *words)
    project.run(*project.family.train, *RUN, "--output_dir", "planned", "--plan", "24")

    nothing, quarter, half, plain = [plan.device for plan in plans]
    assert nothing == plain
    assert half < quarter
    if project.family.name not in LONG_TEXTS:
        assert quarter < plain


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", ["auto", "false"])
def test_compiled_blocks_see_both_lengths(project: TinyProject, dynamic: str) -> None:
    compiled = ("--compile", "--compile_backend", "aot_eager", "--compile_dynamic", dynamic)
    full = project.train("uncompiled", *EXACT, *TREAD)
    for name, tensor in project.train("compiled", *EXACT, *TREAD, *compiled).items():
        torch.testing.assert_close(tensor, full[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_micro_batches_experts_and_a_whole_model_see_fewer_tokens(tmp_path: Path) -> None:
    """A step of two micro-batches is repeated by a resumed run; each is learned by its own expert."""
    project = make_project(family_called("wan t2v-1.3B"), tmp_path)
    write_dit(tmp_path / "model", tiny_state("t2v", num_layers=2, seed=1), name="dit_high")
    experts = ("--task", "t2v-A14B", "--dit_high_noise", "model/dit_high.safetensors", "--lora_per_expert")
    words = (*TREAD, "--gradient_accumulation_steps", "2", *experts, *EXACT)
    state = ("--save_state", "--save_every_n_steps", "2")

    def train(output: str, *more: str) -> list[dict[str, Tensor]]:
        project.run(*project.family.train, *RUN, "--output_dir", output, *words, *more)
        return [load_file(path) for path in sorted((tmp_path / output).glob("x-*_noise.safetensors"))]

    full = train("whole", *state)
    assert len(full) == 2
    resumed = train("resumed", "--resume", "whole/x-step00000002-state")
    assert all(map(same, full, resumed))

    models = project.family.train[1 : project.family.train.index("--network_module")]
    command = (project.family.train_full, *models, *RUN)
    for output, more in {"all": (), "fewer": TREAD}.items():
        project.run(*command, "--output_dir", output, "--learning_rate", "1e-3", *more)
    models_written = [load_file(tmp_path / output / "x.safetensors") for output in ("all", "fewer")]
    assert not same(*models_written)


@pytest.mark.slow
def test_a_model_of_two_streams_is_refused(tmp_path: Path) -> None:
    project = make_project(family_called("ltx_2"), tmp_path)
    command = (*project.family.train, *RUN, "--output_dir", "wrong", *TREAD)

    assert_one_message(*run_here(*command, folder=project.folder), "second stream, for audio")
