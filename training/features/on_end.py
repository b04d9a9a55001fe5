"""Start a command when training is over: --on_end.

`modules/typed_command.py` reads the command and `training/run_end.py` starts it. They are separate because
`reelsmith run` also has such an option, which acts after all its commands.
"""

from modules.options import FREE, SECRET, STARTS, option
from modules.typed_command import AT_END, read_command
from training.features.contract import AT_ENDING, Feature, FeatureOptions
from training.features.hooks import RunEnd, RunFeatures

FLAG = "--on_end"


class EndOptions(FeatureOptions, title="at the end", at=AT_ENDING, facts=FREE):
    """Option for a command that is started when training ends."""

    on_end: str | None = option(AT_END, metavar="COMMAND", facts={**STARTS, **SECRET})

    @property
    def make_command(self) -> list[str]:
        """Return the arguments of the command.

        Raises:
            OptionError: If the command cannot be started.
        """
        assert self.on_end is not None  # the feature is on
        return read_command(FLAG, self.on_end)


def run_end_command(end: RunEnd) -> None:
    """Start the user's command (--on_end), with facts about the ended run in environment variables."""
    from training.reports.drawing import wait_for_page  # only with --on_end
    from training.reports.history import history_path
    from training.run_end import EndedRun, start_command

    options, progress = end.run.options, end.progress
    folder, name = options.saving.folder_and_name
    step = 0 if progress is None else progress.step
    info = EndedRun(
        folder=folder,
        name=name,
        step=step,
        steps=end.total_steps,
        is_finished=end.is_finished,
        page=None if options.logs.no_page else wait_for_page(history_path(folder, name)),
    )
    start_command(FLAG, options.of(EndOptions).make_command, info, end.error, has_begun=end.has_begun)


def _join(run: RunFeatures, options: EndOptions) -> None:
    run.info.at_start["at the end"] = f"starts {options.make_command[0]}"
    run.on.end.append(run_end_command)


ON_END = Feature(
    name="on_end",
    options=EndOptions,
    is_on=lambda options: options.on_end is not None,
    join=_join,
)
