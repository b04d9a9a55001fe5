"""Run tools/diagnose.py after its options are read: find out what a path is, and print what was found."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from checkpoints.opening import SUFFIXES
from data_tools.report.diagnosis.captions import find_caption_findings
from data_tools.report.diagnosis.contract import MeasuredDataset
from data_tools.report.diagnosis.finding import Finding
from data_tools.report.diagnosis.images import find_image_findings
from data_tools.report.diagnosis.trigger_words import find_trigger_findings
from data_tools.report.findings import indent
from data_tools.report.page import STDOUT
from diagnosis.datasets import read_dataset, read_project_dataset
from diagnosis.loras import MeasuredLora, find_lora_findings, find_pair_findings, measure_lora
from diagnosis.rounded_loras import find_rounding_findings, measure_rounded_loras
from diagnosis.training_runs import find_run_findings
from modules.atomic_write import write_text
from modules.console import format_count
from modules.control_codes import escape_control_codes, terminal_width, wrap_text
from modules.errors import OptionError
from modules.options import Options, option
from modules.text_files import parse_toml, read_text
from networks.block_changes import compute_overlaps, compute_shared_parts, list_block_changes
from networks.use_options import multipliers_for
from project.options import RUN_FILE
from training.config_options import PROJECT_TABLE
from training.reports.history import END, history_path
from training.scoring.run import open_run

DATASET_SUFFIXES = frozenset({".toml", ".json"})


class DiagnoseOptions(Options, title="what to diagnose"):
    """Options of tools/diagnose.py."""

    path: Path = option(
        "a folder that `new` described, a dataset file, the folder or history of a run, or a LoRA file",
        positional=True,
        place="there",
    )
    with_lora: Path | None = option("a second LoRA file that is used together with the first", place="file")
    lora_multiplier: tuple[float, ...] = option(
        "strength of each LoRA: of the first one, then of --with_lora",
        default=(1.0, 1.0),
        needs="with_lora",
    )
    dit: Path | None = option(
        "transformer file with 16-bit weights: says how much of the LoRA is left if it is merged into them "
        "and rounded, alone and together with --with_lora",
        place="there",
    )
    json: Path | None = option(
        "write the findings as JSON; without PATH, or with -, to standard output",
        nargs="?",
        const=STDOUT,
        place="new file",
    )


@dataclass(frozen=True)
class Diagnosis:
    """What was looked at, what was found, and lines and values about what cannot be judged."""

    subject: str  # what was looked at, such as "the dataset data.toml"
    findings: Sequence[Finding]
    remarks: Sequence[str] = ()  # what could not be looked at, and why
    rows: Sequence[Mapping[str, Any]] = ()  # measured values of each block of a LoRA


def run_diagnosis(options: DiagnoseOptions) -> None:
    """Print the findings about a path.

    Raises:
        OptionError: If the path is nothing that can be diagnosed.
        DatasetError: If the dataset cannot be read.
        CheckpointError: If the LoRA file cannot be read.
    """
    diagnoses = list_diagnoses(options.path, options.with_lora, options.dit, options.lora_multiplier)
    if options.json is not None:
        content = {
            "findings": [asdict(finding) for diagnosis in diagnoses for finding in diagnosis.findings],
            "remarks": [remark for diagnosis in diagnoses for remark in diagnosis.remarks],
            "blocks": [dict(row) for diagnosis in diagnoses for row in diagnosis.rows],
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        if str(options.json) == STDOUT:
            sys.stdout.write(text)
        else:
            write_text(options.json, text)
        return
    lines = [line for diagnosis in diagnoses for line in _describe(diagnosis)]
    text = escape_control_codes("\n".join(lines))
    sys.stdout.write(wrap_text(text, terminal_width(sys.stdout)) + "\n")


def list_diagnoses(
    path: Path,
    second_lora: Path | None = None,
    dit: Path | None = None,
    multipliers: Sequence[float] = (),
) -> list[Diagnosis]:
    """Diagnose a path: a described folder, a dataset file, a run or a LoRA file.

    Args:
        path: The file or folder.
        second_lora: A LoRA file that is used together with the LoRA file `path`; None for none.
        dit: Transformer file into which LoRA files may be merged; None if nothing is said about it.
        multipliers: Strengths of both LoRA files; 1 where none is given.

    Raises:
        OptionError: If the path is anything else, or a file is given that belongs to a LoRA file.
    """
    if path.suffix in SUFFIXES or (path / "adapter_config.json").exists():
        files = [path, *([] if second_lora is None else [second_lora])]
        strengths = multipliers_for(files, multipliers, "--lora_multiplier")
        loras = [measure_lora(file, strength) for file, strength in zip(files, strengths, strict=True)]
        return [_diagnose_loras(loras, dit)]
    if second_lora is not None:
        raise OptionError(f"--with_lora {second_lora}: it is compared with a LoRA file, and {path} is none")
    if dit is not None:
        raise OptionError(f"--dit {dit}: LoRA files are merged into it, and {path} is none. Omit it")
    if path.name.endswith(END):
        return [_diagnose_run(path)]
    folder = path.parent if path.name == RUN_FILE else path
    if (folder / RUN_FILE).is_file():
        return _diagnose_project(folder)
    if path.suffix in DATASET_SUFFIXES:
        return [_diagnose_dataset(read_dataset(path))]
    if path.is_dir():
        if not any(path.glob(f"*{END}")) and (files := sorted(path.glob("*.safetensors"))):
            raise OptionError(
                f"{path} has no history of a run (...{END}), which other programs and --no_page do not "
                "write: its losses are unknown. Its LoRA files can be diagnosed one by one, such as "
                f"{files[-1]}"
            )
        return [_diagnose_run(path)]
    raise OptionError(
        f"{path}: pass a folder that `new` described, a dataset file (.toml or .json), a run's folder or its "
        f"...{END}, or a LoRA file"
    )


def _diagnose_dataset(dataset: MeasuredDataset) -> Diagnosis:
    remarks = []
    if not dataset.counters:
        remarks.append(
            "How the model's tokenizers cut the trigger word and the captions is unknown: diagnose the "
            "folder that `new` described, with the model's files downloaded. Shuffled captions are "
            "read in the training only."
        )
    if not dataset.trigger_words:
        remarks.append(
            "There is no trigger word: no table has trigger_word, and the captions do not begin with the "
            "same word."
        )
    findings = [
        *find_trigger_findings(dataset),
        *find_caption_findings(dataset),
        *find_image_findings(dataset),
    ]
    return Diagnosis(f"the dataset {dataset.path}", findings, remarks)


def _diagnose_project(folder: Path) -> list[Diagnosis]:
    """Diagnose the dataset of a described folder, and its run if that has begun."""
    path = folder / RUN_FILE
    try:
        tables = parse_toml(read_text(path))
        commands = [list(map(str, argv)) for argv in tables[PROJECT_TABLE]["commands"]]
        training = tables["training"]
        history = history_path(folder / str(training["output_dir"]), str(training["output_name"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise OptionError(f"{path} is not in the form that `new` writes ({error}). Run `new` again") from None
    dataset = read_project_dataset(folder, commands)
    diagnoses = []
    if dataset is not None:
        diagnosis = _diagnose_dataset(dataset)
        # paths of the dataset are relative to the folder
        findings = [
            replace(finding, files=[str(folder / file) for file in finding.files])
            for finding in diagnosis.findings
        ]
        diagnoses.append(replace(diagnosis, findings=findings))
    if history.exists():
        diagnoses.append(_diagnose_run(history))
    return diagnoses


def _diagnose_run(path: Path) -> Diagnosis:
    run = open_run(path)
    return Diagnosis(f"the run {run.history}", list(find_run_findings(run)))


def _diagnose_loras(loras: Sequence[MeasuredLora], dit: Path | None) -> Diagnosis:
    """Diagnose a LoRA file, alone or together with a second one, and merged into a transformer."""
    lora, *others = loras
    changes = list_block_changes(lora.deltas)
    rows: list[dict[str, Any]] = [
        {"block": change.block, "modules": change.num_modules, "norm": change.squared_norm**0.5}
        for change in changes
    ]
    findings = list(find_lora_findings(lora))
    for second in others:
        findings += find_pair_findings(lora, second)
        overlaps = compute_overlaps(lora.deltas, second.deltas)
        shared_parts = compute_shared_parts(lora.deltas, second.deltas)
        for row in rows:
            cosine = overlaps.get(row["block"])
            row["cosine"] = cosine
            row["angle"] = None if cosine is None else math.degrees(math.acos(min(max(cosine, -1), 1)))
            row["shared"] = shared_parts.get(row["block"])
    remarks = []
    if dit is not None:
        kept = measure_rounded_loras(dit, {each.path: each.multiplier for each in loras})
        findings += find_rounding_findings(kept)
        remarks += [share.describe() for share in kept]
    num_unknown = sum(change.num_unknown for change in changes)
    if num_unknown:
        remarks.append(
            f"The change of {format_count(num_unknown, 'module')} depends on the weights of the model (DoRA, "
            "OFT), so that their norms are unknown."
        )
    return Diagnosis(f"the LoRA {lora.path}", findings, remarks, rows)


def _describe(diagnosis: Diagnosis) -> list[str]:
    """Return the lines to print: the findings, what is unknown, and the table of blocks."""
    lines = [f"Diagnosis of {diagnosis.subject}:"]
    for finding in diagnosis.findings:
        lines += ["", *indent(finding.lines)]
    if not diagnosis.findings:
        lines.append("  Nothing was found that explains a LoRA that does not work.")
    lines += [f"  {remark}" for remark in diagnosis.remarks]
    for row in diagnosis.rows:
        overlap = ""
        if row.get("cosine") is not None:
            overlap = f", cosine {row['cosine']:+.3f} ({row['angle']:.1f} degrees)"
        if row.get("shared") is not None:
            overlap += f", {row['shared']:.1%} in directions of the other"
        modules = format_count(row["modules"], "module")
        lines.append(f"  {row['block']}: {modules}, norm {row['norm']:.4g}{overlap}")
    return lines
