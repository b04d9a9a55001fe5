"""Every option of every script that caches, trains or generates does something, or something is said of it.

An option is set to another value, and one of these has to happen: files differ in more than texts that repeat
the option, a new line names it, or the command is refused with its name. All others are in
`tests/data/acts.toml`, each with the reason; an entry that acts by now fails the test, so that the list only
becomes shorter.

An option is the same in two scripts of a kind (caching of latents or texts, training of networks or whole
models, generation, `gen_img.py`) if its name and help are equal. Each is tried with the family that its
setting names, else with the first that has it, in the order of `SWEPT`: Wan, which has most of those of
video, and FLUX.1, which has those of picture trainers, come first; the others add their own. By default a
tenth of the options of these two is tried, the same ones each time; all of them are slow.
"""

import functools
import random
import tomllib
from pathlib import Path

import pytest

from tests.option_settings import SETTINGS
from tests.sweeping import (
    ACTS,
    FAILS,
    FULL,
    GENERATION,
    IMAGES,
    LATENTS,
    METADATA,
    REJECTS,
    SAYS,
    SILENT,
    TEXTS,
    TRAINING,
    Setting,
    Swept,
    info_of_option,
    judge,
    options_of,
    vary,
    write_project,
)
from tests.tiny.families import FAMILIES, TinyFamily
from tests.tiny.further_families import FURTHER
from tests.tiny.runs import RUN

FIRST = ("wan t2v-1.3B", "flux")
BY_NAME = {family.name: family for family in (*FAMILIES, *FURTHER)}
SWEPT = (*FIRST, *(name for name in BY_NAME if name not in FIRST))
KINDS = (LATENTS, TEXTS, TRAINING, FULL, GENERATION, IMAGES)
TRAIN = (*RUN, "--output_dir", "out")
GENERATE = (
    *("--video_size", "32", "32", "--infer_steps", "3", "--guidance_scale", "3", "--seed", "7"),
    *("--prompt", "a cat", "--save_path", "videos", "--output_type"),
)
GEN_IMG_MODEL = "sdxl"
GEN_IMG = ("gen_img.py", "--ckpt", "model/dit.safetensors", "--tokenizer_cache_dir", "tokenizers")
GEN_IMG += (
    "--device",
    "cpu",
    "--W",
    "32",
    "--H",
    "32",
    "--steps",
    "3",
    "--seed",
    "7",
    "--from_file",
    "cat.txt",
)
GEN_IMG += ("--outdir", "videos")
KNOWN: dict[str, dict[str, str]] = tomllib.loads(
    (Path(__file__).parent / "data" / "acts.toml").read_text(encoding="utf-8")
)
LISTED = {METADATA: "metadata", SILENT: "silent", FAILS: "fails"}  # verdicts that need an entry -> its table
SEED, SHARE = 4, 10  # of the options that are tried by default: one of so many


def command_of(family: TinyFamily, kind: str) -> tuple[str, ...]:
    """The script of a family and the words of a run that is short."""
    if kind == TRAINING:
        return (*family.train, *TRAIN)
    if kind == FULL:
        of_lora = "--network_module"  # what follows it is of the LoRA too
        models = family.train[1 : family.train.index(of_lora) if of_lora in family.train else None]
        return (family.train_full, *models, "--learning_rate", "1e-3", *TRAIN) if family.train_full else ()
    if kind == IMAGES:
        return GEN_IMG if family.name == GEN_IMG_MODEL else ()
    if kind == GENERATION:
        form = "latent_images" if family.generate[0].endswith("image.py") else "both"
        return (family.generate[0], *GENERATE, form, *family.generate[1:])
    return tuple(family.cache_latents if kind == LATENTS else family.cache_texts)


@functools.cache
def new_options() -> dict[tuple[str, str], list[str]]:
    """The options that each family is to be tried with in its script of a kind."""
    owners: dict[tuple[str, str, str | None], str] = {}
    seen: set[tuple[str, str, str | None]] = set()
    new: dict[tuple[str, str], list[str]] = {}
    for name in SWEPT:
        for kind in KINDS:
            command = command_of(BY_NAME[name], kind)
            loop = TRAINING if kind == FULL else kind
            own = {
                (loop, one.dest, one.help): one.dest for one in (options_of(command[0]) if command else [])
            }
            for key, dest in own.items():
                owners.setdefault(key, tried_with(name, kind, dest))
            tried = [key for key in own if owners[key] == name and key not in seen]
            new[name, kind] = [own[key] for key in tried]
            seen.update(tried)
    return new


def tried_with(name: str, kind: str, dest: str) -> str:
    """The family that an option is tried with in place of another one of the same script."""
    script = command_of(BY_NAME[name], kind)[0]
    other = setting_of(script, kind, dest).family
    return other if other and command_of(BY_NAME[other], kind)[0] == script else name


def sweep(name: str, kind: str, chosen: list[str], folder: Path) -> list[str]:
    """What is wrong with the chosen options of a family's script."""
    family = BY_NAME[name]
    script, *words = command_of(family, kind)
    write_project(family, folder, kind)
    swept = Swept(script, tuple(words), folder)
    wrong = []
    for action in options_of(script):
        if action.dest not in chosen:
            continue
        setting = setting_of(script, kind, action.dest)
        verdict, shown = judge(swept, vary(swept.words, action, info_of_option(action), setting))
        entry = next(
            (key for key in (f"{script}.{action.dest}", f"{kind}.{action.dest}") if is_known(key)), ""
        )
        if verdict in LISTED and entry not in KNOWN[LISTED[verdict]]:
            wrong.append(f"{script} --{action.dest}: {verdict} {shown}")
        # an entry of a kind of scripts is about the usual value, not about one of this script alone
        elif f"{script}.{action.dest}" in SETTINGS and entry == f"{kind}.{action.dest}":
            continue
        elif entry and verdict in {ACTS, SAYS, REJECTS}:
            wrong.append(
                f"{script} --{action.dest}: {verdict} ({shown}), so {entry} is not an entry of acts.toml"
            )
    return wrong


def is_known(key: str) -> bool:
    return any(key in entries for entries in KNOWN.values())


def setting_of(script: str, kind: str, dest: str) -> Setting:
    """The value of an option by script, by kind, or by name alone."""
    keys = (f"{script}.{dest}", f"{kind}.{dest}", *[f"{TRAINING}.{dest}"] * (kind == FULL), dest)
    return next((SETTINGS[key] for key in keys if key in SETTINGS), Setting())


@pytest.mark.parametrize("kind", [LATENTS, TEXTS, TRAINING, GENERATION])
@pytest.mark.parametrize("name", FIRST)
def test_a_tenth_of_the_options_act(name: str, kind: str, tmp_path: Path) -> None:
    options = new_options()[name, kind]
    chosen = random.Random(SEED).sample(options, -(-len(options) // SHARE))

    assert not sweep(name, kind, chosen, tmp_path / "swept")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SWEPT)
def test_every_option_acts(name: str, kind: str, tmp_path: Path) -> None:
    options = new_options()[name, kind]

    assert not options or not sweep(name, kind, options, tmp_path / "swept")


@pytest.mark.slow
def test_each_entry_is_of_an_option() -> None:
    named = {f"{kind}.{dest}" for (_, kind), dests in new_options().items() for dest in dests}
    scripts = {
        f"{command_of(BY_NAME[name], kind)[0]}.{dest}"
        for (name, kind), dests in new_options().items()
        for dest in dests
    }

    assert {key for entries in KNOWN.values() for key in entries} <= named | scripts
    assert {key.rpartition(".")[2] for key in SETTINGS} <= {key.rpartition(".")[2] for key in named}
