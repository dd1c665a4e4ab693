"""How a script of this folder writes what it measured: data/results, under a line that says what made it."""

import pandas as pd

from lrs_utils.models.download import write_whole
from lrs_utils.notebook import ROOT, revision, versions

RESULTS = ROOT / "data" / "results"


def describe_origin(command: str) -> str:
    """One line: the command, the versions of what it ran on, the commit of the code."""
    return f"python tools/{command} | {versions()} | code {revision()}"


def write_table(name: str, rows: pd.DataFrame, command: str, float_format: str | None = None) -> None:
    """Write data/results/<name>.csv, whole or not at all."""
    table = rows.to_csv(index=False, float_format=float_format)
    write_whole(RESULTS / f"{name}.csv", f"# {describe_origin(command)}\n{table}")
