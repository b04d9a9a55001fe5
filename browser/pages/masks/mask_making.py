"""The form that generates masks for a folder, on the pages New and Datasets."""

import contextlib
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from browser.core.responses import answer_template, answer_unknown
from browser.core.server_state import Site
from browser.folders.described_folder import ChangedMeanwhileError
from browser.folders.draft_changes import folder_routes
from browser.folders.folder_tools import FolderTool
from browser.folders.offered_folders import find_open_folder, list_dataset_media_folders
from browser.folders.tool_form import CHOICE, NUMBER, SWITCH, ToolField, ToolForm, format_option
from browser.jobs.command_lines import format_command
from browser.jobs.jobs import Job
from browser.jobs.model_files import TaskFiles, find_task
from browser.pages.masks.mask_review import find_masks_folder
from browser.pages.masks.mask_use import MaskUse, read_mask_use
from browser.runs.runs import FINISHED
from data_tools.masks.places import BACKGROUND_FILE, FACE_FILE, IS_COLOR, MODEL_FOLDER
from downloads.catalogue import model_sets
from modules.errors import OptionError, UserError
from modules.pages.language import refusal, say
from project.options import MODELS

NO_COLOR = "RRGGBB"  # placeholder in the shown command
DESCRIPTION_SEPARATOR = ";"  # separates things to find
# detection methods, named like the options of the tool; "" is --what
BY_DESCRIPTION, WATERMARK, BACKGROUND, FACES, COLOR = "", "watermark", "background", "faces", "colour"
FINDERS = {
    BY_DESCRIPTION: say("what I name below"),
    BACKGROUND: say("what stands before the background"),
    FACES: say("faces"),
    COLOR: say("a color"),
    WATERMARK: say("all but watermarks and texts"),
}
DEFAULT_NETWORKS = {
    BY_DESCRIPTION: MODEL_FOLDER,
    WATERMARK: MODEL_FOLDER,
    BACKGROUND: BACKGROUND_FILE,
    FACES: FACE_FILE,
}
FORM = ToolForm(
    name="mask",
    script="tools/mask.py",
    fields=(
        ToolField(
            "mode",
            say("Masks that are there"),
            CHOICE,
            {
                "": say("stay"),
                "add": say("get what is found in addition"),
                "subtract": say("lose what is found"),
                "replace": say("are replaced, also those drawn by hand"),
            },
        ),
        ToolField("threshold", say("Found above"), NUMBER),
        ToolField("expand_pixels", say("Grown by (pixels)"), NUMBER),
        ToolField("feather_pixels", say("Soft edge (pixels)"), NUMBER),
        ToolField("steady_frames", say("Steady over frames of clips"), NUMBER),
        ToolField("invert", say("learn everything else"), SWITCH),
        ToolField("overwrite", say("make those again that the program made otherwise"), SWITCH),
    ),
)


class MaskMakingPages:
    """Shows the form that generates the masks of a folder, and handles its buttons."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.tool = FolderTool(site, FORM.script, "trymasks")

    def show(self, folder: Path, query: Mapping[str, str]) -> Response:
        """Return the HTML of the mask tool's form, or of its section named in the query."""
        return self.answer(folder, query, query.get("part", ""))

    def answer(self, folder: Path, fields: Mapping[str, str], section: str = "", error: str = "") -> Response:
        """Return the HTML of the form for masks and its progress.

        Args:
            folder: The folder. If its dataset.toml names several media folders, the form selects one.
            section: "form" or "progress"; "" for both.
        """
        # once one of several media folders is selected, the form sends the folder of run.toml as `outer`
        described_folder = find_open_folder(self.site.runs, fields.get("outer", "")) or folder
        folders = list_dataset_media_folders(self.site.runs, described_folder)
        folder = folder if folder in folders else folders[0]
        values: dict[str, Any] = {
            "folder": folder,
            "outer": described_folder,
            "folders": folders,
            "part": section,
            "refused": error,
            "can_write": not self.site.read_only,
            "form": FORM,
            "finders": FINDERS,
            "texts": fields,
        }
        if section in ("", "form"):
            values |= self.collect_form(folder, fields)
        if section in ("", "progress"):
            values |= self.tool.collect_progress(folder)  # also sets "job"
            values["use"] = self.find_use(folder)
            values["is_first"] = self.offers_training(values["use"], values["job"])
        return answer_template("masks/mask_making.html", say("Masks"), values, is_rejected=error != "")

    def collect_form(self, folder: Path, fields: Mapping[str, str]) -> dict[str, Any]:
        """Return the template values of the form: the mask model, and the commands of the buttons."""
        try:
            dry_run = format_command(self.make_argv(folder, fields, is_dry_run=True), folder)
            lines = [dry_run, format_command(self.make_argv(folder, fields, is_dry_run=False), folder)]
        except OptionError as error:  # the error is shown next to both buttons
            lines = [str(error), str(error)]
        finder = fields.get("finder", BY_DESCRIPTION)
        return {
            "model": self.find_model(finder),
            "model_place": self.name_network(finder),
            "lines": lines,
            "use": self.find_use(folder),
        }

    def find_use(self, folder: Path) -> MaskUse | None:
        """Return how dataset.toml uses the masks of a folder; None if it cannot use any."""
        use = read_mask_use(self.site.runs, folder)
        return use if use is not None and use.num_masks else None

    def offers_training(self, use: MaskUse | None, job: Job | None) -> bool:
        """Return whether a job has written masks since dataset.toml was last changed.

        Then the page offers to train with them.
        """
        if use is None or use.is_used or job is None or job.state != FINISHED or self.site.read_only:
            return False
        with contextlib.suppress(OSError):
            return use.config.path.stat().st_mtime < job.log.stat().st_mtime
        return False

    def find_model(self, finder: str) -> TaskFiles | None:
        """Return the catalogue's network for a mask finder, with the state of its files; None if none."""
        network = DEFAULT_NETWORKS.get(finder)
        for model in model_sets() if network is not None else ():
            if any(MODELS / section.path == PurePath(network or "") for section in model.components):
                return find_task(self.site.models, model.family, model.task)
        return None

    def name_network(self, finder: str) -> str:
        """Return the download path of the network that a mask finder uses; "" if it uses none."""
        network = DEFAULT_NETWORKS.get(finder)
        return "" if network is None else str((self.site.models / network.relative_to(MODELS)).absolute())

    def make_argv(self, folder: Path, fields: Mapping[str, str], is_dry_run: bool) -> list[str]:
        """Return the command line of the mask tool.

        Args:
            is_dry_run: Whether only to print what the tool would do.

        Raises:
            OptionError: If a field has a value that its option does not accept.
        """
        finder = fields.get("finder", BY_DESCRIPTION)
        if finder not in FINDERS:
            raise refusal("%(finder)s is not a way to find masks: choose from the list.", finder=finder[:40])
        network = fields.get("model", "").strip() or self.name_network(finder)
        argv = [*FORM.make_argv(".", fields), *_make_finder_options(finder, network, fields)]
        masks = find_masks_folder(self.site.runs, folder)
        if masks == folder:  # masks are next to their media
            argv.append("--beside")
        elif masks is not None:
            argv += format_option("output", str(masks))
        return [*argv, "--dry_run"] if is_dry_run else argv

    def change(self, folder: Path, action: str, fields: Mapping[str, str]) -> Response:
        """Handle a pressed button of the mask tool's form, and return the HTML of the tool's progress."""

        def make_argv(is_dry_run: bool) -> list[str]:
            self.require_ready(fields, is_dry_run)
            return self.make_argv(folder, fields, is_dry_run)

        try:
            if action == "learn":  # write whether training runs use the masks
                use = read_mask_use(self.site.runs, folder)
                if use is None:
                    raise refusal("It is not prepared yet: press Prepare first.")
                self.site.tracked_runs.reject_while_it_runs(use.config.path.parent)
                if fields.get("learns"):
                    use.enable()
                else:
                    use.disable()
            elif not self.tool.handle_button(folder, action, make_argv):
                return answer_unknown()
        except ChangedMeanwhileError:
            message = say("dataset.toml has changed in the meantime: press the button again.")
            return self.answer(folder, fields, "progress", error=message)
        except (UserError, OSError, ValueError) as error:
            return self.answer(folder, fields, "progress", error=str(error))
        return self.answer(folder, fields, "progress")

    def require_ready(self, fields: Mapping[str, str], is_dry_run: bool) -> None:
        """Raise OptionError if the form names no object to mask, or if the mask model is not downloaded."""
        finder = fields.get("finder", BY_DESCRIPTION)
        if finder == BY_DESCRIPTION and not fields.get("what", "").replace(DESCRIPTION_SEPARATOR, "").strip():
            raise refusal("Type what to find, such as: the person.")
        if finder == COLOR and not IS_COLOR.fullmatch(fields.get("colour", "").strip()):
            raise refusal("Type the color to find in six hexadecimal digits, such as 00ff00 for green.")
        network = self.name_network(finder)
        if not is_dry_run and network and not fields.get("model", "").strip() and not Path(network).exists():
            raise refusal("%(missing)s is missing: download the model first (Models).", missing=network)


def _make_finder_options(finder: str, network: str, fields: Mapping[str, str]) -> list[str]:
    """Return the options of the mask tool that say what it finds, and with which network."""
    if finder == COLOR:
        return format_option(COLOR, fields.get("colour", "").strip() or NO_COLOR)
    if finder in (BACKGROUND, FACES):  # options of their own that name the network
        return format_option(finder, network)
    if finder == WATERMARK:
        return ["--watermark", *format_option("model", network)]
    options = []
    for description in fields.get("what", "").split(DESCRIPTION_SEPARATOR):
        if description.strip():  # the mask tool takes one --what for each object
            options += format_option("what", " ".join(description.split()))
    return [*options, *format_option("model", network)]


def mask_making_routes(site: Site) -> list[Route]:
    """Return the routes of the mask tool's form."""
    return folder_routes(site, "masks", MaskMakingPages(site), find_open_folder)
