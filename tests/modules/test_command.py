"""Commands that messages tell to type."""

import pytest

from modules import command


@pytest.mark.parametrize(
    ("system", "typed"),
    [
        ("posix", r"python x.py --vae 'models/my vae.pt' --dataset_config 'C:\d.toml'"),
        ("nt", r'python x.py --vae "models/my vae.pt" --dataset_config C:\d.toml'),  # cmd knows no single quotes
    ],
)
def test_commands_are_quoted_for_the_shell_of_the_system(monkeypatch: pytest.MonkeyPatch, system: str, typed: str) -> None:
    monkeypatch.setattr(command.os, "name", system)
    words = ["python", "x.py", "--vae", "models/my vae.pt", "--dataset_config", r"C:\d.toml"]
    assert command.as_typed(words) == typed
