"""Windows and shifts of noise levels that tables of a dataset have for themselves."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modules.errors import DatasetError, OptionError, UserError
from protocols.family import NoiseSpec
from tests.faults.messages import succeed_here
from tests.tiny.families import FAMILIES
from tests.training import toy
from tests.training.test_experts import BOTH
from tests.training.test_resume import train_in_two_processes
from training.checks import list_unused_options
from training.data.feed import Feed
from training.data.table_times import timestep_options_by_group
from training.learner import FULL_MODEL
from training.plan import read_config
from training.run import prepare_run, train_network
from training.training_run import TrainingRun

LOW = "max_timestep = 400"
HIGH = "min_timestep = 700"
UNIFORM = ("--timestep_sampling", "uniform")
SHIFT = ("--timestep_sampling", "shift", "--discrete_flow_shift", 3)


def write_tables(folder: Path, *keys: str, general: str = "", batch_size: int = 1, count: int = 6) -> Path:
    """Caches of `count` pictures for each table; keys: those of each."""
    text = f"[general]\nresolution = [32, 32]\nbatch_size = {batch_size}\n{general}\n"
    for number, more in enumerate(keys):
        toy.write_caches(folder / str(number), count=count)
        here = (folder / str(number)).as_posix()
        text += f'[[datasets]]\nimage_directory = "{here}/images"\ncache_directory = "{here}/cache"\n{more}\n'
    path = folder / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    return path


def levels_by_table(run: TrainingRun, epochs: int = 4) -> dict[int, list[float]]:
    """The noise levels of all samples of some epochs, by the table, in the order of training."""
    levels: dict[int, list[float]] = {}
    for key in ((epoch, index) for epoch in range(epochs) for index in range(run.steps.num_batches)):
        table = run.feed.order.epoch(key[0])[key[1]][0].table
        levels.setdefault(table.index, []).extend((1000 * run.feed.read(key).sigmas).tolist())
    return levels


def train_and_read(folder: Path, *arguments: object) -> dict[str, torch.Tensor]:
    return toy.train_toy(folder, "--max_train_epochs", 2, *arguments)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("min_timestep = 300\nmax_timestep = 600", ("--min_timestep", 300, "--max_timestep", 600)),
        ("min_timestep = 300", ("--min_timestep", 300)),
        ("discrete_flow_shift = 7", ("--discrete_flow_shift", 7)),
    ],
)
@pytest.mark.parametrize("where", ["general", "table"])
@pytest.mark.parametrize(
    "more", [(), ("--num_timestep_buckets", 4), ("--preserve_distribution_shape",)], ids=str
)
def test_a_key_is_the_option_of_its_name_to_the_bit(
    tmp_path: Path, keys: str, words: tuple[object, ...], where: str, more: tuple[object, ...]
) -> None:
    plain, keyed = tmp_path / "plain", tmp_path / "keyed"
    sampler = ("--timestep_sampling", "shift", "--gradient_accumulation_steps", 2, *more)
    write_tables(plain, "")
    write_tables(keyed, keys if where == "table" else "", general=keys if where == "general" else "")

    expected = train_and_read(plain, *sampler, *words)

    assert toy.same(train_and_read(keyed, *sampler), expected)
    assert not toy.same(train_and_read(plain, *sampler, "--overwrite"), expected)


def test_each_table_is_trained_in_its_window(tmp_path: Path) -> None:
    write_tables(tmp_path, LOW, HIGH, "")
    with prepare_run(toy.ToyFamily(), toy.toy_options(tmp_path, *UNIFORM)) as run:
        low, high, all_levels = (levels for _, levels in sorted(levels_by_table(run).items()))

    assert 0 <= min(low) < 100 < 300 < max(low) <= 400
    assert 700 <= min(high) < 800 < 900 < max(high) <= 1000
    assert min(all_levels) < 200
    assert max(all_levels) > 800


def test_keys_of_a_table_come_before_general_and_that_before_the_command(tmp_path: Path) -> None:
    write_tables(tmp_path, "", "max_timestep = 1000\nmin_timestep = 0", general="max_timestep = 200")
    with prepare_run(toy.ToyFamily(), toy.toy_options(tmp_path, *UNIFORM, "--max_timestep", 900)) as run:
        of_general, full = (levels for _, levels in sorted(levels_by_table(run).items()))

    assert max(of_general) <= 200
    assert max(full) > 900


def test_a_table_is_squeezed_or_drawn_again_as_the_run_is(tmp_path: Path) -> None:
    write_tables(tmp_path, "min_timestep = 500", "")
    words = ("--timestep_sampling", "shift", "--discrete_flow_shift", 9)
    means = []
    for more in ((), ("--preserve_distribution_shape",)):
        with prepare_run(toy.ToyFamily(), toy.toy_options(tmp_path, *words, *more)) as run:
            levels = levels_by_table(run, 40)[0]
            assert min(levels) >= 500
            means.append(sum(levels) / len(levels))
    squeezed, again = means
    assert squeezed == pytest.approx(500 + 0.5 * 853, abs=20)
    assert again == pytest.approx(871, abs=20)


def test_a_shift_of_a_table_moves_its_draws_alone(tmp_path: Path) -> None:
    write_tables(tmp_path, "discrete_flow_shift = 20", "")
    plain, shifted = {}, {}
    with prepare_run(toy.ToyFamily(), toy.toy_options(tmp_path, *SHIFT)) as run:
        shifted = levels_by_table(run)
    write_tables(tmp_path, "", "")
    with prepare_run(toy.ToyFamily(), toy.toy_options(tmp_path, *SHIFT)) as run:
        plain = levels_by_table(run)

    assert shifted[1] == plain[1]
    for before, after in zip(plain[0], shifted[0], strict=True):
        odds = before / (1000 - before) * 20 / 3
        assert after == pytest.approx(1000 * odds / (1 + odds), rel=1e-3)


def of_read(feed: Feed, keys: list[tuple[int, int]]) -> list[float]:
    return [float(value) for key in keys for value in feed.read(key).sigmas]


def test_buckets_count_the_samples_of_each_table(tmp_path: Path) -> None:
    """Four draws of a table in a row take one of each quarter of its window, whatever is between them."""
    write_tables(tmp_path, LOW, HIGH, "", batch_size=2, count=5)
    options = toy.toy_options(tmp_path, *UNIFORM, "--num_timestep_buckets", 4)
    with prepare_run(toy.ToyFamily(), options) as run:
        for index, levels in levels_by_table(run, 8).items():
            low, high = [(0, 400), (700, 1000), (0, 1000)][index]
            assert len(levels) == 40
            for first in range(0, 40, 4):
                quarters = [4 * (level - low) / (high - low) for level in levels[first : first + 4]]
                assert sorted(map(int, quarters)) == [0, 1, 2, 3], (index, first)


def test_buckets_of_a_table_are_the_same_where_a_run_begins_in_the_middle(tmp_path: Path) -> None:
    write_tables(tmp_path, LOW, HIGH, batch_size=2, count=5)
    options = toy.toy_options(tmp_path, *UNIFORM, "--num_timestep_buckets", 4)
    keys = [(3, 1), (3, 2), (4, 0)]
    with prepare_run(toy.ToyFamily(), options) as run:
        levels_by_table(run, 3)
        expected = of_read(run.feed, keys)
    with prepare_run(toy.ToyFamily(), options) as run:
        assert of_read(run.feed, keys) == expected


@pytest.mark.slow
def test_a_killed_run_with_windows_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    write_tables(tmp_path, LOW, HIGH, batch_size=2, count=5)
    words = [*UNIFORM, "--num_timestep_buckets", 4, "--save_every_n_steps", 1, "--save_state"]
    words += ["--gradient_accumulation_steps", 2, "--ema_decay", 0.5, "--resume", "latest"]
    words += ["--max_data_loader_n_workers", 1]

    expected = toy.train_toy(tmp_path, *words)

    assert toy.same(expected, toy.train_with_kills(tmp_path, *words, moments=(3, 5)))


def test_a_changed_window_is_another_run(tmp_path: Path) -> None:
    write_tables(tmp_path, LOW, HIGH)
    toy.train_toy(tmp_path, *UNIFORM, "--max_train_steps", 2, "--save_state")
    write_tables(tmp_path, "max_timestep = 500", HIGH)

    with pytest.raises(OptionError, match=r"max_timestep = 400 .*in the state"):
        toy.train_toy(tmp_path, *UNIFORM, "--resume", "latest")


# --- two transformers; the toy's boundary is 600


def experts_by_table(folder: Path, *words: object, family: Any = BOTH) -> dict[int, set[int]]:
    options = toy.toy_options(folder, *words)
    experts: dict[int, set[int]] = {}
    with prepare_run(family, options) as run:
        for epoch in range(6):
            for index, items in enumerate(run.feed.order.epoch(epoch)):
                expert = run.feed.find_expert((epoch, index))
                assert expert == run.feed.read((epoch, index)).expert
                experts.setdefault(items[0].table.index, set()).add(expert)
    return experts


@pytest.mark.parametrize("more", [(), ("--num_timestep_buckets", 4), ("--preserve_distribution_shape",)])
def test_a_window_below_the_boundary_trains_the_low_noise_expert_alone(
    tmp_path: Path, more: tuple[object, ...]
) -> None:
    write_tables(tmp_path, LOW, HIGH, "", batch_size=2)

    assert experts_by_table(tmp_path, *UNIFORM, *more) == {0: {0}, 1: {1}, 2: {0, 1}}


def test_an_expert_with_next_to_no_draws_of_a_table_gets_none(tmp_path: Path) -> None:
    """A batch for it could not be filled."""
    write_tables(tmp_path, "discrete_flow_shift = 0.001", "", batch_size=3)

    assert experts_by_table(tmp_path, *SHIFT) == {0: {0}, 1: {0, 1}}


def test_an_expert_that_no_table_reaches_is_an_error(tmp_path: Path) -> None:
    write_tables(tmp_path, LOW, "max_timestep = 590")
    with pytest.raises(OptionError, match="no timestep of this run reaches the high-noise transformer"):
        train_network(BOTH, toy.toy_options(tmp_path, *UNIFORM))
    write_tables(tmp_path, LOW, "min_timestep = 600\nmax_timestep = 1000")  # whatever the options say
    train_network(BOTH, toy.toy_options(tmp_path, *UNIFORM, "--max_timestep", 400))


def test_a_table_without_levels_of_the_trained_expert_is_an_error(tmp_path: Path) -> None:
    write_tables(tmp_path, LOW, "")
    high_alone = replace(BOTH, experts=BOTH.experts[1:])
    with pytest.raises(
        DatasetError, match=r"\[\[datasets\]\] 1 .*max_timestep = 400: only levels from 600 on"
    ):
        train_network(high_alone, toy.toy_options(tmp_path, *UNIFORM))
    write_tables(tmp_path, "max_timestep = 700", "")
    with prepare_run(high_alone, toy.toy_options(tmp_path, *UNIFORM)) as run:
        levels = levels_by_table(run)

    assert 600 <= min(levels[0]) <= max(levels[0]) <= 700 < max(levels[1])


def test_windows_say_which_expert_the_only_transformer_is(tmp_path: Path) -> None:
    family = replace(toy.ToyFamily(), defaults=replace(toy.ToyFamily().defaults, experts=toy.TWO_EXPERTS))
    path = tmp_path / "output" / "x.safetensors"
    for keys, expert in (((LOW, "max_timestep = 590"), "low"), ((HIGH, HIGH), "high"), ((LOW, ""), None)):
        write_tables(tmp_path, *keys)
        toy.train_toy(tmp_path, *UNIFORM, "--max_train_steps", 1, "--overwrite", family=family)
        assert toy.metadata_of(path).get("ss_wan_expert") == expert


# --- files, reports, refusals


def test_a_file_says_the_windows_it_was_trained_with(tmp_path: Path) -> None:
    write_tables(tmp_path, "min_timestep = 100\nmax_timestep = 400", "max_timestep = 700")
    toy.train_toy(tmp_path, *UNIFORM, "--max_train_steps", 1)
    metadata = toy.metadata_of(tmp_path / "output" / "x.safetensors")

    assert metadata["modelspec.timestep_range"] == "0,700"
    assert '"min_timestep": 100, "max_timestep": 400' in metadata["ss_datasets"]


@pytest.mark.parametrize(
    ("keys", "words", "message"),
    [
        ("min_timestep = 500\nmax_timestep = 400", (), "min_timestep = 500 is not below max_timestep = 400"),
        ("min_timestep = 400\nmax_timestep = 400", (), "so no noise level is left"),
        ("min_timestep = 0.4", (), r"min_timestep = 0.4 .*a whole number from 0 to 999, in thousandths"),
        ("max_timestep = 1001", (), "a whole number from 1 to 1000"),
        ("max_timestep = 0", (), "a whole number from 1 to 1000"),
        ("min_timestep = -1", (), "a whole number from 0 to 999"),
        ("min_timestep = '500'", (), r"\(text\); allowed: a whole number"),
        ("min_timesteps = 500", (), "Did you mean min_timestep"),
        ("flow_shift = 5", (), "Did you mean discrete_flow_shift"),
        ("discrete_flow_shift = 0", (), "a number above 0, at most 1000"),
        ("discrete_flow_shift = 5", UNIFORM, "--timestep_sampling uniform has no shift"),
        ("discrete_flow_shift = 5", (), "--timestep_sampling sigma has no shift"),
        (
            "discrete_flow_shift = 5",
            ("--timestep_sampling", "flux_shift"),
            "--timestep_sampling flux_shift takes its shift from the size of each item",
        ),
        (
            "discrete_flow_shift = 5",
            ("--timestep_sampling", "qinglong_qwen"),
            "Omit the key, or use --timestep_sampling shift",
        ),
        (HIGH, (*UNIFORM, "--max_timestep", 600), "--min_timestep 700 --max_timestep 600, one of them from"),
        (HIGH, (*UNIFORM, "--timestep_focus", 0.4), "min_timestep = 700 with --timestep_focus 0.4: a window"),
        (
            f"{HIGH}\nvalidation = true",
            (),
            "min_timestep with validation = true: this table is never trained",
        ),
        (
            "min_timestep = 999",
            ("--timestep_sampling", "logsnr", "--logit_mean", 9, "--preserve_distribution_shape"),
            "--timestep_sampling logsnr draws no level there",
        ),
    ],
)
def test_keys_that_cannot_be_are_explained_before_anything_is_loaded(
    tmp_path: Path, keys: str, words: tuple[object, ...], message: str
) -> None:
    write_tables(tmp_path, "", keys)
    options = toy.toy_options(tmp_path, *words)
    with pytest.raises(UserError, match=message) as raised:
        read_config(options, toy.ToyFamily(), FULL_MODEL)
    assert "[[datasets]] 2" in str(raised.value)


def test_a_focus_goes_with_a_shift_of_a_table(tmp_path: Path) -> None:
    write_tables(tmp_path, "discrete_flow_shift = 20", "")
    options = toy.toy_options(tmp_path, *SHIFT, "--timestep_focus", 0.5, "--timestep_focus_range", 100, 120)
    with prepare_run(toy.ToyFamily(), options) as run:
        for levels in levels_by_table(run, 20).values():
            assert sum(100 <= level <= 120 for level in levels) / len(levels) == pytest.approx(0.5, abs=0.15)


def test_a_focus_below_the_trained_levels_is_refused(tmp_path: Path) -> None:
    write_tables(tmp_path, "")
    high_alone = replace(BOTH, experts=BOTH.experts[1:])
    words = ("--timestep_focus", 0.5, "--timestep_focus_range", 100, 600)
    with pytest.raises(
        OptionError, match="--timestep_focus_range 100 600: only levels from 600 on are trained"
    ):
        read_config(toy.toy_options(tmp_path, *words), high_alone, FULL_MODEL)


def test_a_table_of_validation_in_a_file_with_general_windows_is_measured_as_ever(tmp_path: Path) -> None:
    write_tables(tmp_path, "", "validation = true", general=HIGH)
    options = toy.toy_options(tmp_path, *UNIFORM, "--validate_every_n_steps", 1)
    with prepare_run(toy.ToyFamily(), options) as run:
        assert run.validation is not None
        assert run.validation.sigmas == [0.1, 0.3, 0.5, 0.7, 0.9]
        assert min(levels_by_table(run)[0]) >= 700


def test_options_that_all_tables_replace_are_named(tmp_path: Path) -> None:
    write_tables(tmp_path, LOW, "max_timestep = 500\ndiscrete_flow_shift = 5")
    options = toy.toy_options(tmp_path, *SHIFT, "--max_timestep", 900, "--preserve_distribution_shape")
    tables = read_config(options, toy.ToyFamily(), FULL_MODEL).datasets

    lines = list_unused_options(options, takes_guidance=True, shifts_table=False, tables=tables)
    assert lines == ["--max_timestep has no effect: each table of the dataset has its own."]
    timesteps = replace(options.timesteps, max_timestep=None)
    typed = options.typed_options - {"max_timestep"}
    alone = replace(options, timesteps=timesteps, typed_options=typed)
    assert list_unused_options(alone, takes_guidance=True, shifts_table=False, tables=tables) == []
    (line,) = list_unused_options(alone, takes_guidance=True, shifts_table=False)
    assert line == (
        "--preserve_distribution_shape has no effect: neither --min_timestep nor --max_timestep is set."
    )


def test_without_keys_nothing_is_counted_for_a_table(tmp_path: Path) -> None:
    write_tables(tmp_path, "", "validation = true")
    options = toy.toy_options(tmp_path, *UNIFORM)

    assert (
        timestep_options_by_group(
            options.timesteps, read_config(options, toy.ToyFamily(), FULL_MODEL).datasets
        )
        == {}
    )


def test_every_distribution_of_a_dataset_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tables(tmp_path, LOW, HIGH, LOW)
    words = (*UNIFORM, "--show_timesteps")
    assert train_network(BOTH, toy.toy_options(tmp_path, *words, "console")) == 0
    shown = capsys.readouterr().out

    first, second, weights = shown.split("timesteps drawn\n")[0], *shown.split("timesteps drawn\n")[1:]
    assert "[[datasets]] 1" in first
    assert "[[datasets]] 3" in first
    assert "[[datasets]] 2" in second
    assert "low-noise transformer: timesteps from 0 to 600, 100.0% of the draws" in second
    assert "high-noise transformer: timesteps from 600 to 1000, 100.0% of the draws" in weights
    assert shown.count("loss weights") == 1

    assert train_network(BOTH, toy.toy_options(tmp_path, *words, "image")) == 0
    assert (tmp_path / "output" / "timesteps.png").stat().st_size > 10_000


def test_the_check_and_the_start_say_the_timesteps_of_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_tables(tmp_path, LOW, f"{HIGH}\ndiscrete_flow_shift = 5")
    train_network(toy.ToyFamily(), toy.toy_options(tmp_path, *SHIFT, "--check"))
    printed = capsys.readouterr().out
    with caplog.at_level("INFO"):
        toy.train_toy(tmp_path, *SHIFT, "--max_train_steps", 1)

    for line in ("[[datasets]] 1: 0 to 400", "[[datasets]] 2: 700 to 1000, shift 5"):
        assert line in printed
        assert line in caplog.text


def test_the_sampler_sigma_counts_the_window_of_a_table_from_the_noisy_end(tmp_path: Path) -> None:
    write_tables(tmp_path, "max_timestep = 200", "")
    with prepare_run(toy.ToyFamily(), toy.toy_options(tmp_path, "--timestep_sampling", "sigma")) as run:
        assert min(levels_by_table(run)[0]) > 800


def test_a_model_with_a_shifted_table_takes_a_shift_with_sigma(tmp_path: Path) -> None:
    write_tables(tmp_path, "discrete_flow_shift = 50", "")
    family = replace(toy.ToyFamily(), noise=NoiseSpec(0.0, table_is_shifted=True))
    with prepare_run(family, toy.toy_options(tmp_path, "--timestep_sampling", "sigma")) as run:
        shifted, plain = (sorted(levels) for _, levels in sorted(levels_by_table(run).items()))

    assert shifted[len(shifted) // 4] > 900 > plain[len(plain) // 2]


def test_wan_learns_from_a_table_with_keys_what_it_learns_from_options(tmp_path: Path) -> None:
    """With the commands that a user types."""
    family = FAMILIES[0]
    family.prepare(tmp_path)
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    output = [
        "--output_dir",
        "output",
        "--seed",
        "1",
        "--max_train_steps",
        "3",
        "--num_timestep_buckets",
        "2",
    ]
    sampler = ["--timestep_sampling", "shift", "--max_data_loader_n_workers", "0"]
    words = ["--min_timestep", "200", "--max_timestep", "700", "--discrete_flow_shift", "4"]
    succeed_here(*family.train, *output, *sampler, *words, "--output_name", "plain", folder=tmp_path)
    path = tmp_path / "dataset.toml"
    keys = "min_timestep = 200\nmax_timestep = 700\ndiscrete_flow_shift = 4\n"
    path.write_text(path.read_text(encoding="utf-8") + keys, encoding="utf-8")
    succeed_here(*family.train, *output, *sampler, "--output_name", "keyed", folder=tmp_path)

    plain, keyed = (load_file(tmp_path / "output" / f"{name}.safetensors") for name in ("plain", "keyed"))
    assert toy.same(plain, keyed)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over files")
def test_two_processes_draw_what_one_with_twice_the_accumulation_draws(tmp_path: Path) -> None:
    write_tables(tmp_path, LOW, HIGH, batch_size=2, count=5)
    words = [*UNIFORM, "--num_timestep_buckets", 4]
    expected = toy.train_toy(tmp_path, *words, "--gradient_accumulation_steps", 2)

    train_in_two_processes(tmp_path, 29671, *words, "--output_dir", tmp_path / "two")

    for name, tensor in load_file(tmp_path / "two" / "x.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
