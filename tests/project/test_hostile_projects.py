"""`new --from` with broken, foreign or hostile files: a sentence, exit 1 or 2, and nothing is made."""

import json
from pathlib import Path
from typing import Any

import pytest

from modules.errors import OptionError
from tests.faults.messages import assert_one_message, run_here
from tests.project.foreign_samples import SAMPLES
from tests.project.test_new import write_photos

BOMB = "a0: &a0 {}\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 11))
JOB = "job: extension\nconfig: {name: x, process: [{type: sd_trainer, network: {type: lora}, "
GUI = {"LoRA_type": "Standard", "sdxl": True, "train_data_dir": "photos", "max_train_steps": 3}
HUGE = "9" * 5000
# name of the file, and what is in it; None: it is a folder
FILES: list[tuple[str, bytes | None]] = [
    ("empty.yaml", b""),
    ("empty.json", b""),
    ("empty.toml", b""),
    ("blank.yml", b" \n\t\n"),
    ("bomb.yaml", BOMB.encode()),
    ("code.yaml", b"config: {process: [{type: !!python/object/apply:os.system ['touch made']}]}"),
    ("itself.yaml", b"config: &a {process: [*a]}"),
    ("two.yaml", b"a: 1\n---\nb: 2\n"),
    ("tabs.yaml", b"config:\n\tprocess: []\n"),
    ("number.yaml", JOB.encode() + f"train: {{steps: {HUGE}}}}}]}}".encode()),
    ("nan.json", b'{"training_method": NaN, "model_type": Infinity}'),
    ("huge.json", f'{{"training_method": "LORA", "epochs": {HUGE}}}'.encode()),
    ("utf16.json", json.dumps(GUI).encode("utf-16")),
    ("utf32.toml", "epochs = 1".encode("utf-32")),
    ("latin.json", '{"LoRA_type": "é"}'.encode("latin-1")),
    ("deep.json", b'{"LoRA_type": ' + b"[" * 100_000),
    ("keys.json", json.dumps({"training_method": {str(n): n for n in range(9000)}}).encode()),
    ("text.json", b'"LoRA_type"'),
    ("list.json", b'[{"LoRA_type": "Standard"}, 7, null]'),
    ("null.json", b"null"),
    ("cut.json", json.dumps(GUI).encode()[:-9]),
    ("trailing.json", json.dumps(GUI).encode()[:-1] + b",}"),
    ("large.toml", b"epochs = 1\nx = '" + b"y" * 50_000_000 + b"'\n"),
    ("dotted.toml", b"a." * 20_000 + b"a = 1\n"),
    ("twice.toml", b"epochs = 1\nepochs = 2\n"),
    ("options.toml", b'network_module = "networks.lora"\noptimizer_type = "AdamW"\n'),
    ("command.sh", b"accelerate launch sdxl_train_network.py --network_dim $(touch made)\n"),
    ("binary.json", bytes(range(256))),
    ("wrong.json", b'{"LoRA_type": {"a": [1]}, "sdxl": [], "v2": {}, "max_train_steps": {"b": 2}}'),
    ("method.json", b'{"training_method": {"a": 1}, "model_type": [[]]}'),
    ("job.yaml", b"job: [1]\nconfig: {process: [{type: {a: 1}, network: [1]}]}"),
    ("family.json", b'{"model_family": {"a": 1}, "model_type": ["lora"]}'),
    ("model.toml", b"epochs = 1\nmicro_batch_size_per_gpu = 1\n[model]\ntype = [1, [2]]\n"),
    ("a folder.json", None),
]


@pytest.mark.parametrize(("name", "content"), FILES, ids=[name for name, _ in FILES])
def test_a_broken_project_is_a_sentence_and_nothing_is_made(
    name: str, content: bytes | None, tmp_path: Path
) -> None:
    write_photos(tmp_path / "photos", 2)
    file = tmp_path / name
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    code, said = run_here("new_project.py", "photos", "--from", name, "--memory", "0", folder=tmp_path)
    assert_one_message(code, said)
    assert code in {1, 2}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 2)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(GUI).encode())
    command = ["photos", "--from", "a.json", "--memory", "24"]
    assert run_here("new_project.py", *command, folder=tmp_path) == (0, "")
    assert (tmp_path / "photos" / "run.toml").is_file()


WRONG: list[Any] = [{}, {"a": 1}, [[{"x": []}]], 10**400, -1, True, "\0", "nan", float("inf"), "1e999", None]


def replace_each(content: Any, wrong: Any, key: Any = None) -> Any:
    """Return the content with every plain value but those of one key replaced."""
    if isinstance(content, dict):
        return {
            name: value if name == key else replace_each(value, wrong, key) for name, value in content.items()
        }
    if isinstance(content, list) and any(isinstance(item, dict) for item in content):
        return [replace_each(item, wrong, key) for item in content]
    return wrong


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:12])
def test_wrong_types_in_every_key_are_left_or_refused(wrong: Any, tmp_path: Path) -> None:
    from project.foreign.reading import read_foreign

    told = 0
    for sample in SAMPLES.values():
        contents = {name: content for name, content in sample.files.items() if not isinstance(content, str)}
        marks = ("type", "training_method", "model_family", "LoRA_type")
        for mark in marks if contents else ():
            for name, content in contents.items():
                text = json.dumps(replace_each(content, wrong, mark))
                (tmp_path / name).write_text(text, encoding="utf-8")
            try:
                project = read_foreign(tmp_path / next(iter(sample.files)))
            except OptionError:
                told += 1
            else:
                told += len(project.format_report(tmp_path)) > 1
    assert told
