"""--train_embedding and --textual_inversion_embeddings by commands, on tiny models of every family."""

import io
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.faults.messages import assert_one_message, run_here
from tests.tiny.families import FAMILIES, LAYERED, family_called
from tests.tiny.further_families import FURTHER
from tests.tiny.runs import RUN, Latents, TinyProject
from tests.tiny.wan import tiny_state, write_dit
from tests.training.toy import same

WORD = "zorb"
PROMPT = f"a {WORD} on a table"
LEARN = ("--train_embedding", WORD, "--embedding_vectors", "2", "--embedding_lr", "1", "--embedding_file")
# whose text encoders read captions together with reference images
SEEING = ("qwen_image edit-2511", "krea2 edit", "qwen_image_21 edit", "moss_image edit", "fibo_2 edit")
# one of each kind of text encoder
BY_DEFAULT = ("wan t2v-1.3B", "flux", "qwen_image")
# images of layers come as several files; HiDream-O1-Image has no text encoder
OTHERS = (*SEEING, LAYERED.name, "hidream_o1", "hidream_o1 edit")
TESTED = {family.name: family for family in (*FAMILIES, *FURTHER) if family.name not in OTHERS}
KINDS = [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in TESTED]


@pytest.fixture(scope="module", params=KINDS)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """A project without caches of texts, whose captions have the word."""
    made = TinyProject(TESTED[request.param], tmp_path_factory.mktemp("a project"))
    made.family.prepare(made.folder)
    for caption in (made.folder / "clips").glob("*.txt"):
        caption.write_text(PROMPT, encoding="utf-8")
    made.run(*made.family.cache_latents)
    return made


def test_vectors_learn_and_are_used(project: TinyProject) -> None:
    tensors = project.train("words", *LEARN, "--save_every_n_steps", "1")
    first = load_file(project.folder / "words" / "x-step00000001.safetensors")
    rows = {name: tensor for name, tensor in tensors.items() if name.startswith(f"bundle_emb.{WORD}.")}
    alone = load_file(project.folder / "words" / f"x_{WORD}.safetensors")

    assert {f"bundle_emb.{WORD}.{key}": len(tensor) for key, tensor in alone.items()} == dict.fromkeys(
        rows, 2
    )
    assert not any(torch.equal(first[name], tensor) for name, tensor in rows.items())

    save_file(alone, project.folder / f"{WORD}.safetensors")
    plain = {name: tensor for name, tensor in tensors.items() if name not in rows}
    save_file(plain, project.folder / "plain.safetensors")

    def generate(output: str, *words: object) -> list[Latents]:
        built_in = ("--guidance_scale", "1") if "--guidance_scale" in project.family.generate else ()
        return project.generate(output, "--prompt", PROMPT, "--seed", "1", *built_in, *words)

    whole = generate("whole", "--lora_weight", "words/x.safetensors")
    parts = generate(
        "parts", "--lora_weight", "plain.safetensors", "--textual_inversion_embeddings", f"{WORD}.safetensors"
    )
    without = generate("without", "--lora_weight", "plain.safetensors")
    assert all(same(one, other) for one, other in zip(whole, parts, strict=True))
    assert not any(same(one, other) for one, other in zip(whole, without, strict=True))


EXPERTS = ("--task", "t2v-A14B", "--dit_high_noise", "model/dit_high.safetensors")


@pytest.mark.slow_cases("two experts", "two encoders", "anima", "default rank")
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("wan t2v-1.3B", ()),
        ("qwen_image", ()),
        ("wan t2v-1.3B", EXPERTS),
        ("flux", ()),
        ("anima", ()),
        ("minimax_h3", ()),
    ],
    ids=["T5", "Qwen", "two experts", "two encoders", "anima", "default rank"],
)
def test_a_word_learns_alone(name: str, more: tuple[str, ...], tmp_path: Path) -> None:
    made = TinyProject(TESTED[name], tmp_path)
    if more:
        write_dit(tmp_path / "model", tiny_state("t2v", num_layers=2, seed=1), name="dit_high")
    made.family.prepare(tmp_path)
    for caption in (tmp_path / "clips").glob("*.txt"):
        caption.write_text(PROMPT, encoding="utf-8")
    made.run(*made.family.cache_latents)
    train = [*made.family.train, *RUN, "--output_name", WORD]
    for option in ("--network_module", "--network_dim"):
        if option in train:
            train[train.index(option) : train.index(option) + 2] = []
    train += ["--train_embedding", WORD, "--embedding_vectors", "2", "--embedding_only", *more]

    planned = io.StringIO()
    code, told = run_here(*train, "--plan", "--output_dir", "words", folder=tmp_path, printed=planned)
    assert code == 0, told
    assert "network (textual inversion)" in planned.getvalue()
    said = made.run(*train, "--output_dir", "words", "--save_state", "--save_every_n_steps", "2")
    file = tmp_path / "words" / f"{WORD}.safetensors"
    rows = load_file(file)
    first = load_file(tmp_path / "words" / f"{WORD}-step00000002.safetensors")
    made.run(*train, "--output_dir", "resumed", "--resume", f"words/{WORD}-step00000002-state")

    assert {len(vectors) for vectors in rows.values()} == {2}
    assert all(len(vectors.shape) == 2 for vectors in rows.values())
    assert not any(torch.equal(first[key], vectors) for key, vectors in rows.items())
    assert same(rows, load_file(tmp_path / "resumed" / f"{WORD}.safetensors"))
    assert "--textual_inversion_embeddings" in said
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_network_module"] == "textual inversion"
    prompt = ("--prompt", PROMPT, "--seed", "1")
    if more or name == "minimax_h3":
        return  # the project's own command generates with one expert, and with guidance
    whole = made.generate("whole", *prompt, "--textual_inversion_embeddings", file)
    without = made.generate("without", *prompt)
    assert not any(same(one, other) for one, other in zip(whole, without, strict=True))
    wrong = (*train, "--network_dim", "4", "--output_dir", "wrong")
    assert_one_message(*run_here(*wrong, folder=tmp_path), "--embedding_only trains no LoRA")
    wrong = (*train, "--embedding_lr", "1", "--output_dir", "wrong")
    assert_one_message(*run_here(*wrong, folder=tmp_path), "--embedding_lr")


@pytest.mark.slow
def test_a_caption_that_is_read_with_its_references_is_refused(tmp_path: Path) -> None:
    made = TinyProject(family_called("qwen_image edit-2511"), tmp_path)
    made.family.prepare(tmp_path)
    made.run(*made.family.cache_latents)

    command = (*made.family.train, *RUN, "--output_dir", "wrong", *LEARN)
    assert_one_message(*run_here(*command, folder=tmp_path), "together with their reference images")


@pytest.mark.slow
def test_a_resumed_run_is_the_same_also_through_an_encoder_in_8_bits(tmp_path: Path) -> None:
    """Samples have the word too, and a prompt of an unknown embedding is told."""
    made = TinyProject(family_called("wan t2v-1.3B"), tmp_path)
    made.family.prepare(tmp_path)
    for caption in (tmp_path / "clips").glob("*.txt"):
        caption.write_text(PROMPT, encoding="utf-8")
    made.run(*made.family.cache_latents)
    (tmp_path / "samples.txt").write_text(
        f"embedding:{WORD} --w 32 --h 32 --f 5 --s 2 --d 1\nembedding:other --w 32 --h 32 --f 5 --s 2\n",
        encoding="utf-8",
    )
    words = (
        "--fp8_t5",
        "--train_embedding",
        WORD,
        "--embedding_init_word",
        "rabbit",
        "--embedding_lr",
        "0.1",
    )
    samples = ("--sample_prompts", "samples.txt", "--sample_every_n_steps", "1", "--sample_at_first")

    told = made.run(*made.family.train, *RUN, "--output_dir", "full", *words, *samples)
    tensors = load_file(tmp_path / "full" / "x.safetensors")
    made.train("halves", *words, "--save_state", "--save_every_n_steps", "2")
    resumed = made.train("resumed", *words, "--resume", "halves/x-step00000002-state")

    assert same(tensors, resumed)
    assert "embedding:other in a prompt is read as words" in told
    assert f"embedding:{WORD} in" not in told
    pictures = [path.read_bytes() for path in sorted((tmp_path / "full" / "sample").glob("*_00_*.mp4"))]
    assert len(set(pictures)) == len(pictures) > 2
