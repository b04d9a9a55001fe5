"""Options of the scripts that train textual inversion. Standard library only."""

from pathlib import Path

from modules.errors import OptionError
from modules.options import FREE, IDENTITY, Options, option
from protocols.new_tokens import MAX_VECTORS, WordOptionNames, WordToLearn, find_error

FLAGS = WordOptionNames(
    word="--token_string",
    count="--num_vectors_per_token",
    init_word="--init_word",
    weights="--weights",
    rate="--learning_rate",
    without_captions="--use_object_template",
)


class InversionOptions(Options, title="textual inversion"):
    """Options of textual inversion: the new word, its initial vectors and the captions to train it with."""

    token_string: str | None = option(
        "the new word, as written in captions and sample prompts; it must not be a token of the text "
        "encoders",
        often=True,
        facts=IDENTITY,
    )
    num_vectors_per_token: int = option(
        "number of vectors of the word; each takes up one of the 75 tokens of a caption",
        default=1,
        minimum=1,
        maximum=MAX_VECTORS,
        hint="1 to 8 are usual",
        often=True,
        facts=IDENTITY,
    )
    init_word: str | None = option(
        "existing words whose vectors initialize the new ones, in this order; default: random vectors",
        often=True,
        facts=FREE,
        acts_if={"--weights has the first vectors": lambda options: options.weights is None},
    )
    weights: Path | None = option("file of a textual inversion to continue with", facts=FREE)
    use_object_template: bool = option(
        'learn "a photo of a WORD" and 26 other sentences instead of captions, one drawn for each image',
        facts=IDENTITY,
    )
    use_style_template: bool = option(
        'learn "a painting in the style of WORD" and 18 other sentences instead of captions; ignored '
        "with --use_object_template",
        facts=IDENTITY,
        acts_if={"--use_object_template comes first": lambda options: not options.use_object_template},
    )

    def __post_init__(self) -> None:
        why = "" if self.token_string is None else find_error(self.token_string)
        if why:
            raise OptionError(f"--token_string {self.token_string!r} {why}")

    @property
    def word(self) -> WordToLearn:
        """Return the new word.

        Raises:
            OptionError: If no word is given.
        """
        if self.token_string is None:
            raise OptionError("--token_string is missing. Pass the new word, such as --token_string mycat")
        return WordToLearn(
            self.token_string,
            self.num_vectors_per_token,
            FLAGS,
            init_word=self.init_word,
            weights=self.weights,
        )
