"""Uploads never end a run. The model card: what it says, and whose card is left alone."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from modules.errors import OptionError
from protocols.rules import ModelRelease
from tests.training.toy import metadata_of, toy_options, train_toy, write_caches
from training.features.uploads_hub import Uploads, can_replace_card, download_state, make_uploads, write_card
from training.features.uploads_options import UploadOptions

RELEASE = ModelRelease(("Wan-AI/Wan2.1-T2V-1.3B",), "Apache-2.0", "apache-2.0", "https://example.org/apache")
METADATA = {
    "modelspec.title": "My cat",
    "modelspec.license": "Apache-2.0",
    "modelspec.tags": "cat, video",
    "ss_network_dim": "32",
    "ss_learning_rate": "0.0002",
    "ss_training_comment": "None",
    "ss_datasets": json.dumps(
        [{"resolution": [480, 480], "video_directory": "secret", "trigger_word": "blorp"}]
    ),
}
HOSTILE = (
    "x\n---\nlicense: mit\n# <script>alert(1)</script>\n```\n[a](javascript:b) --> <!-- \u2028 \x1b[31m "
    '"quoted": {a: b} *&anchor !!python/object:os.system\r\n\'; | > - ?'
)


def card_of(release: ModelRelease = RELEASE, name: str = "my_cat", **metadata: str) -> str:
    """The card of a run with some metadata changed."""
    changed = {key.replace("__", "."): text for key, text in metadata.items()}
    return write_card(name, True, release, {**METADATA, **changed}, ["a cat walks"])


def front_matter(card: str) -> dict[str, Any]:
    """The YAML of a card, read as the hub does: between the first two lines of `---`."""
    start, block, _ = card.split("---\n", 2)
    assert start == ""
    values: dict[str, Any] = yaml.safe_load(block)
    return values


def test_the_card_says_what_the_file_is_and_how_it_was_made() -> None:
    card = card_of()

    assert front_matter(card) == {
        "base_model": ["Wan-AI/Wan2.1-T2V-1.3B"],
        "base_model_relation": "adapter",
        "tags": ["reelsmith", "lora", "cat", "video"],
        "license": "apache-2.0",
        "instance_prompt": "blorp",
        "widget": [{"text": "a cat walks"}],
    }
    for words in ("# My cat\n", "    rank: 32\n", "    data: resolution [480, 480]\n", "taught: blorp\n"):
        assert words in card
    assert "    --lora_weight my_cat.safetensors --lora_multiplier 1.0\n" in card
    assert "secret" not in card  # names of the user's folders
    assert "comment" not in card


TENCENT = ModelRelease(("tencent/HunyuanVideo",), "Tencent Hunyuan Community", "other", "https://e.org/l")


@pytest.mark.parametrize(
    ("given", "licence", "name", "link"),
    [
        ("Tencent Hunyuan Community", "other", "tencent-hunyuan-community", "https://e.org/l"),
        ("All mine, ask", "other", "all-mine-ask", None),
        ("CC-BY-4.0", "cc-by-4.0", None, None),
    ],
)
def test_another_licence_is_named_as_the_hub_wants_it(
    given: str, licence: str, name: str | None, link: str | None
) -> None:
    found = front_matter(card_of(TENCENT, modelspec__license=given))
    assert [found.get(key) for key in ("license", "license_name", "license_link")] == [licence, name, link]


def test_hostile_text_stays_text() -> None:
    tables = json.dumps([{"resolution": [1, 1], "trigger_word": HOSTILE}])
    metadata = {
        **{f"modelspec.{key}": HOSTILE for key in ("title", "description", "license", "tags")},
        "ss_training_comment": HOSTILE,
        "ss_network_args": HOSTILE,
        "ss_datasets": tables,
    }
    card = write_card(HOSTILE, True, RELEASE, metadata, [HOSTILE, "\ud83d"])

    values = front_matter(card)
    own = {"base_model", "base_model_relation", "tags", "license", "license_name"}
    assert set(values) == {*own, "instance_prompt", "widget"}
    assert values["license"] == "other"
    assert values["widget"][0]["text"].startswith("x --- license: mit")
    body = card.split("---\n", 2)[2]
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings[1:] == ["## Use", "## Training", "## License"]
    text = "\n".join(line for line in body.splitlines() if not line.startswith("    "))
    assert "<script" not in text
    assert "](" not in text.replace("[Wan-AI/Wan2.1-T2V-1.3B](https://huggingface.co/", "")
    assert text.count("<!--") == text.count("-->") == 1  # the mark at the end
    assert not [code for code in card if code != "\n" and (ord(code) < 32 or code == "\u2028")]
    assert can_replace_card(card, card)


def test_a_card_names_the_files_of_both_transformers() -> None:
    files = {part: Path(f"x-000001_{part}.safetensors") for part in ("low_noise", "high_noise")}
    line = "--lora_weight x-000001_low_noise.safetensors"
    line += " --lora_weight_high_noise x-000001_high_noise.safetensors"
    assert f"    {line} --lora_multiplier 1.0\n" in write_card("x", True, RELEASE, METADATA, files=files)


@pytest.mark.parametrize(
    ("existing", "expected"),
    [
        (card_of(), True),
        (card_of().replace("\n", "\r\n"), True),
        (card_of(modelspec__title="Before"), True),
        (card_of().replace("My cat", "My own words"), False),
        (card_of(name="another"), False),
        ("# Written by hand\n", False),
        ("", False),
    ],
    ids=["unchanged", "line ends", "earlier run", "edited", "other file", "by hand", "empty"],
)
def test_only_an_unchanged_card_of_the_same_file_is_replaced(existing: str, expected: bool) -> None:
    assert can_replace_card(existing, card_of()) is expected


class FakeRepository:
    """A repository that may have a README.md, and notes what it is asked."""

    def __init__(self, readme: str | None = None, fails: str = "") -> None:
        self.readme, self.fails = readme, fails
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, token: str | None) -> "FakeRepository":
        self.token = token
        return self

    def __getattr__(self, name: str) -> Any:
        def call(**arguments: Any) -> Any:
            if self.fails == name:
                raise ConnectionError("no network")
            self.calls.append((name, arguments))
            return self.readme if name == "hf_hub_download" else self.readme is not None

        return call

    @property
    def uploaded(self) -> dict[str, Any]:
        files = [arguments for name, arguments in self.calls if name == "upload_file"]
        return {each["path_in_repo"]: each["path_or_fileobj"] for each in files}


def uploads_to(folder: Path, api: FakeRepository, *more: str) -> Uploads:
    return make_uploads(
        toy_options(folder, "--huggingface_repo_id", "me/loras", *more).of(UploadOptions), api
    )


def card_for(path: Path) -> str:
    """Return the card that names a file."""
    return write_card("my_cat", True, RELEASE, METADATA, files={"": path})


def publish(folder: Path, api: FakeRepository, *more: str) -> FakeRepository:
    """Upload a file twice with its card."""
    with contextlib.closing(replace(uploads_to(folder, api, *more), card=card_for)) as uploads:
        for name in ("x-000001.safetensors", "x.safetensors"):
            uploads.publish(folder / name)
    return api


@pytest.mark.parametrize("more", [(), ("--async_upload",)])
def test_a_repository_without_a_card_gets_one(tmp_path: Path, more: tuple[str, ...]) -> None:
    api = publish(tmp_path, FakeRepository(), *more, "--huggingface_path_in_repo", "wan")

    assert sorted(api.uploaded) == ["README.md", "wan/x-000001.safetensors", "wan/x.safetensors"]
    assert api.uploaded["README.md"] == card_for(Path("x.safetensors")).encode()
    assert b"--lora_weight x.safetensors " in api.uploaded["README.md"]
    cards = [info["path_or_fileobj"] for name, info in api.calls if info.get("path_in_repo") == "README.md"]
    assert cards == [card_for(Path(name)).encode() for name in ("x-000001.safetensors", "x.safetensors")]


def test_a_users_own_card_is_kept(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Written by hand\n", encoding="utf-8")
    api = publish(tmp_path, FakeRepository(str(readme)))

    assert sorted(api.uploaded) == ["x-000001.safetensors", "x.safetensors"]


def test_a_card_that_fails_costs_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    api = publish(tmp_path, FakeRepository(fails="file_exists"))

    assert sorted(api.uploaded) == ["x-000001.safetensors", "x.safetensors"]
    assert caplog.text.count("the model card was not uploaded to me/loras: no network") == 1


def test_a_run_uploads_a_card_and_marks_its_file_with_the_models_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path)
    api = FakeRepository()
    monkeypatch.setattr("huggingface_hub.HfApi", api)
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["a cat", {"seed": 3, "nonsense": 1}]', encoding="utf-8")
    samples = ["--sample_prompts", prompts, "--sample_every_n_steps", 100]

    train_toy(tmp_path, "--huggingface_repo_id", "me/loras", *samples)

    assert caplog.text.count("nonsense") == 1
    values = front_matter(api.uploaded["README.md"].decode())
    assert (values["base_model"], values["license_name"]) == (["owner/toy"], "toy-license")
    assert values["widget"] == [{"text": "a cat"}]
    assert metadata_of(tmp_path / "output" / "x.safetensors")["modelspec.license"] == "Toy license"


@pytest.mark.parametrize("background", [[], ["--async_upload"]])
def test_files_and_states_go_to_their_place_in_order(tmp_path: Path, background: list[str]) -> None:
    api = FakeRepository()
    words = "--huggingface_path_in_repo wan --save_state_to_huggingface --huggingface_repo_visibility public "
    words += "--huggingface_token secret"
    (tmp_path / "x-state").mkdir()

    with contextlib.closing(uploads_to(tmp_path, api, *words.split(), *background)) as uploads:
        uploads.publish(tmp_path / "x.safetensors")
        uploads.publish_state(tmp_path / "x-state")

    assert api.token == "secret"
    names, arguments = zip(*api.calls, strict=True)
    assert names == ("create_repo", "upload_file", "create_repo", "upload_folder")
    made = {"repo_id": "me/loras", "repo_type": "model", "private": False, "exist_ok": True}
    assert arguments[0] == made
    assert arguments[1]["path_in_repo"] == "wan/x.safetensors"
    assert arguments[3]["path_in_repo"] == "wan/x-state"


def test_a_run_that_fails_still_sends_what_it_saved(tmp_path: Path) -> None:
    api = FakeRepository()

    with (
        contextlib.suppress(OptionError),
        contextlib.closing(uploads_to(tmp_path, api, "--async_upload")) as uploads,
    ):
        uploads.publish(tmp_path / "x.safetensors")
        raise OptionError("something else")

    assert [name for name, _ in api.calls] == ["create_repo", "upload_file"]


def test_a_failed_upload_is_reported_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uploads_to(tmp_path, FakeRepository(fails="upload_file")).publish(tmp_path / "x.safetensors")

    assert "was saved but not uploaded to me/loras: no network" in caplog.text


def test_a_state_is_fetched_by_repository_path_revision_and_kind(tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(**arguments: Any) -> str:
        asked.update(arguments)
        (tmp_path / "runs" / "x-state").mkdir(parents=True)
        return str(tmp_path)

    folder = download_state("me/loras/runs/x-state:v2:dataset", "secret", tmp_path, download)

    assert folder == tmp_path / "runs" / "x-state"
    expected = {"repo_id": "me/loras", "revision": "v2", "repo_type": "dataset"}
    expected |= {"allow_patterns": "runs/x-state/*", "token": "secret"}
    assert {key: asked[key] for key in expected} == expected


@pytest.mark.parametrize("place", ["x-state", "me/loras", "me/loras:main"])
def test_a_place_without_a_path_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(OptionError, match=r"owner/repo/path"):
        download_state(place, None, tmp_path, lambda **_: "")
