"""Options of where prompts, pictures and seeds come from. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.option_values import check_at_least, check_seed


@dataclass(frozen=True)
class PictureInputOptions:
    """Where prompts, input pictures and seeds come from."""

    prompt: str | None
    from_file: Path | None
    from_module: str | None  # an import path or a file
    prompter_module_args: str | None  # what that module makes of it is its own matter
    interactive: bool
    no_preview: bool
    image_path: Path | None  # a picture or a folder of pictures: image to image
    mask_path: Path | None  # likewise: inpainting, or regions of the parts of prompts with AND
    guide_image_path: tuple[Path, ...] | None  # likewise, for ControlNets, CLIP or VGG16
    images_per_prompt: int
    n_iter: int  # how often all prompts are gone through
    shuffle_prompts: bool
    batch_size: int
    seed: int | None
    iter_same_seed: bool

    def __post_init__(self) -> None:
        sources = {
            "--prompt": self.prompt is not None and self.from_module is None,
            "--from_file": self.from_file is not None,
            "--from_module": self.from_module is not None,
            "--interactive": self.interactive,
        }
        given = [option for option, is_given in sources.items() if is_given]
        if len(given) > 1:
            raise OptionError(f"{' and '.join(given)}: give one of them")
        if not given and self.image_path is None:
            raise OptionError(
                "There is no prompt: give --prompt, --from_file, --from_module or --interactive, or "
                "--image_path with pictures whose metadata holds their prompts"
            )
        if self.prompter_module_args is not None and self.from_module is None:
            raise OptionError("--prompter_module_args needs --from_module")
        if self.no_preview and not self.interactive:
            raise OptionError("--no_preview is for --interactive, the only mode that shows pictures")
        rounds = {
            "--n_iter": self.n_iter != 1,
            "--shuffle_prompts": self.shuffle_prompts,
            "--iter_same_seed": self.iter_same_seed,
        }
        for option in (option for option, is_given in rounds.items() if is_given and self.interactive):
            raise OptionError(f"{option} with --interactive: there are no prompts to go through")
        if self.shuffle_prompts and self.from_module is not None:
            raise OptionError("--shuffle_prompts with --from_module: the module decides which prompt is next")
        for option in ("images_per_prompt", "n_iter", "batch_size"):
            check_at_least(f"--{option}", getattr(self, option), 1, "a number of pictures or rounds")
        check_seed("--seed", self.seed)
        self._check_files()

    def _check_files(self) -> None:
        texts = [("--from_file", self.from_file, "a text file")]
        if self.from_module is not None and self.from_module.endswith(".py"):
            texts.append(("--from_module", Path(self.from_module), "a Python file, or a module's name"))
        for option, path, what in texts:
            if path is not None and not path.is_file():
                reason = "it is a folder" if path.is_dir() else "there is no such file"
                raise OptionError(f"{option} {path}: {reason}. Give {what}")
        pictures = [("--image_path", self.image_path), ("--mask_path", self.mask_path)]
        pictures += [("--guide_image_path", path) for path in self.guide_image_path or ()]
        for option, path in pictures:
            if path is not None and not path.exists():
                raise OptionError(
                    f"{option} {path}: there is no such file. Give a picture or a folder of pictures"
                )


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `PictureInputOptions`."""
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt",
        help="what to show; may end in options, such as 'a cat --n ugly --w 512 --h 768 --d 7'",
    )
    group.add_argument("--from_file", help="text file with such a prompt on each line; # begins a comment")
    group.add_argument(
        "--from_module",
        help="Python module, or a .py file, whose get_prompter makes prompts; its code runs, so use it only "
        "if you trust it",
    )
    group.add_argument(
        "--prompter_module_args", help="a text that the module of --from_module finds in its options"
    )
    group.add_argument(
        "--interactive",
        action="store_true",
        help="ask for prompts; Ctrl-C drops the current one, quit ends",
    )
    group.add_argument(
        "--no_preview", action="store_true", help="with --interactive: do not open pictures in a viewer"
    )
    group.add_argument(
        "--images_per_prompt", type=int, default=1, help="pictures of each prompt, with different seeds"
    )
    group.add_argument("--n_iter", type=int, default=1, help="how often all prompts are gone through")
    group.add_argument(
        "--shuffle_prompts", action="store_true", help="go through the prompts in another order in each round"
    )
    group.add_argument("--batch_size", type=int, default=1, help="pictures that are made at once")
    group.add_argument(
        "--seed",
        type=int,
        help="seed of a single picture; the seeds of several pictures are drawn from it; random if not given",
    )
    group.add_argument(
        "--iter_same_seed",
        action="store_true",
        help="all prompts of a round have the same seeds: only the prompt differs",
    )
    group = parser.add_argument_group("input pictures")
    group.add_argument(
        "--image_path",
        help="image to image: a picture, or a folder whose pictures are used in turn. Without a prompt, "
        "those in the metadata of the pictures are used",
    )
    group.add_argument(
        *("--mask_path", "--mask_image"),
        dest="mask_path",
        help="a picture, or a folder of them. With --image_path, inpainting: white is painted anew. For "
        "prompts with AND: red, green and blue are the regions of the first three parts and of their LoRAs",
    )
    group.add_argument(
        "--guide_image_path",
        nargs="*",
        help="pictures, or folders of them, for ControlNets or ControlNet-LLLites: one for each of them, "
        "then one for each for the next picture, and so on. For guidance by CLIP or VGG16: one for each "
        "picture",
    )
