"""Options of one command are repeated in the next one as they were typed, where it has them."""

from pathlib import Path

from modules.option_values import Placeholder, Repeated, missing_words, option_argv
from modules.options import Options, option
from modules.repeated_options import fill_options, join_options, repeat_given


class FirstFiles(Options):
    """Files of the first command."""

    vae: Path | None = option("VAE", flags=("--first_vae",))


class FirstCommand(Options):
    """A command."""

    files: FirstFiles
    form: str | None = option("form of the weights")
    small: bool = option("less memory", excludes="form")
    kind: bool = option("a switch here")
    steps: int = option("steps", default=4)


class NextFiles(Options):
    """Files of the next command."""

    autoencoder: Path | None = option("VAE", flags=("--first_vae", "--vae"))


class NextOne(Options):
    """The command that follows; `kind` takes a path here."""

    files: NextFiles
    form: str | None = option("form of the weights")
    small: bool = option("less memory", excludes="form")
    kind: Path | None = option("a file here")


def given(**values: object) -> FirstCommand:
    vae = Path("a vae.pt")
    return FirstCommand(files=FirstFiles(vae=vae), **values)


def test_options_are_typed_again_as_they_were_typed() -> None:
    typed = {"vae": "--first_vae", "form": "--form"}
    repeated = repeat_given(given(form="nf4", steps=9, kind=True), typed)

    assert option_argv(join_options(NextOne, {}, repeated)) == ["--first_vae", "a vae.pt", "--form", "nf4"]


def test_what_is_chosen_counts_and_a_missing_file_is_filled_in() -> None:
    repeated = repeat_given(given(form="nf4"))
    chosen = {"--first_vae": Placeholder("VAE_FILE"), "--form": None, "--t5": Placeholder("T5_FILE")}

    words = option_argv(join_options(NextOne, chosen, repeated))

    assert words == ["--vae", "a vae.pt", "--t5", "T5_FILE"]
    assert missing_words(words) == ["T5_FILE"]


def test_an_option_of_several_texts_is_typed_once_for_each() -> None:
    words = option_argv({"--ref": Repeated(("a.png", "-b.png")), "--more": Repeated(()), "--steps": 4})

    assert words == ["--ref", "a.png", "--ref=-b.png", "--steps", "4"]


def test_a_record_takes_what_it_does_not_say_itself() -> None:
    earlier = repeat_given(given(form="nf4"))

    filled = fill_options(NextOne(), earlier)
    beside = fill_options(NextOne(small=True), earlier)

    assert (filled.files.autoencoder, filled.form) == (Path("a vae.pt"), "nf4")
    assert (beside.files.autoencoder, beside.form, beside.small) == (Path("a vae.pt"), None, True)
