"""The torch and transformers that the tests pass on: others are refused by name instead of failing somewhere inside."""

from importlib.metadata import requires, version

from packaging.requirements import Requirement


def refuse_unsupported() -> None:
    """Raise ImportError where an installed version lies outside this package's own requirements."""
    for requirement in map(Requirement, requires("lrs-utils") or []):
        name, bounds = requirement.name, requirement.specifier
        if name in ("torch", "transformers") and not bounds.contains(version(name), prereleases=True):
            raise ImportError(
                f"lrs_utils is tested on {name} {bounds}, not on {version(name)}: pip install '{requirement}'"
            )
