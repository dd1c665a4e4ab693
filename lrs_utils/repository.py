"""Where the clone is: for notebooks, and for tools that run from a clone, only.

Nothing that works from a wheel imports this; there `ROOT` is the folder of the installed packages.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def profiles(root: Path = ROOT) -> dict[str, Path]:
    """The files of notebooks/profiles by name.

    Raises
    ------
    FileNotFoundError
        There are none: this is no clone.
    """
    found = {path.stem: path for path in sorted((root / "notebooks" / "profiles").glob("*.yaml"))}
    if not found:
        raise FileNotFoundError(f"{root} has no notebooks/profiles: notebooks and tools run from a clone, not a wheel")
    return found
