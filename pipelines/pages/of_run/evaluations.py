"""What student-eval has put on record of runs: a table for each protocol, with whatever was measured by it on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from student.evals.records import cell, columns, groups, read, title
from student.files.checkpoint import CHECKPOINT

from .run_facts import RunFacts

FILE = "evaluations.jsonl"
"""In the folder of a run: records that are found without being named."""


@dataclass(frozen=True)
class Evaluations:
    """Records, and which of them are of the runs of a page."""

    records: list[dict] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)
    """Weights (as records have them) -> name of the run that they are of."""
    folders: dict[Path, str] = field(default_factory=dict)
    """Folder of a run, resolved -> its name; a record of a checkpoint in it is of that run."""

    def run_of(self, record: dict) -> str | None:
        """Name of the run that a record is of."""
        checkpoint = record.get("checkpoint")
        folder = self.folders.get(Path(checkpoint).resolve().parent) if isinstance(checkpoint, str) and checkpoint else None
        return folder or self.weights.get(record["weights"])

    def tables(self) -> list[dict]:
        """caption, columns and rows of each group of records that can be compared, if one of them is of a run here."""
        made = []
        for group in groups(self.records):
            if not any(map(self.run_of, group)):
                continue
            names = columns(group)
            rows = [[self._name(record), record["readout"], *(cell(record, name) for name in names)] for record in group]
            made.append({"caption": title(group).replace("\n", "; "), "columns": ["encoder", "token", *names], "rows": rows})
        return made

    def _name(self, record: dict) -> str:
        run, step = self.run_of(record), CHECKPOINT.fullmatch(Path(str(record.get("checkpoint") or "")).name)
        if run is None:
            return f"{record['what']} ({record['about']})" if record.get("about") else str(record["what"])
        averaged = ", averaged" if "averaged" in str(record.get("about")) else ""
        return f"{run}, step {int(step[1]):,}{averaged}" if step else f"{run}{averaged}"


def records_of(runs: Sequence[RunFacts], files: Sequence[Path]) -> list[dict]:
    """The records in `files`, and in evaluations.jsonl of each run. Raises RunError for a file that cannot be read."""
    beside = [run.path / FILE for run in runs if (run.path / FILE).exists()]
    return [record for path in dict.fromkeys([*beside, *files]) for record in read(path)]
