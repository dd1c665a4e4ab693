"""Factor files: a scaling and where it came from, as versioned JSON. Some ship with the package."""

import json
import warnings
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from lrs_utils.arguments import instance
from lrs_utils.models.download import write_whole
from lrs_utils.models.load import LM
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.extension import ExtendedScaling
from lrs_utils.scaling.heads import HeadScaling
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scaling.rope import COMBINATIONS, DYNAMIC

# 2: numbers of heads, 3: of bands, 4: factors of heads, which a reader of an earlier version would leave out silently
_FORMAT, _VERSIONS = "lrs-factors", (1, 2, 3, 4)
_SHIPPED = files("lrs_utils") / "data" / "factors"
_LAYER_KEYS = {"scheme", "factors", "temperatures", "bands", "extension", "combine"}
_HEAD_KEYS = {"head_temperatures", "head_gains", "mlp_gains", "head_factors", "head_scheme"}
_RESERVED = {"format", "version", *_LAYER_KEYS, *_HEAD_KEYS}


def save_factors(path: str | Path, scaling: Scaling, **provenance: Any) -> None:
    """Write a scaling and where it came from as versioned JSON; the file appears whole or not at all.

    `provenance` is any JSON value by name: model, fingerprint, settings, versions, command, what was measured.
    """
    reserved = _RESERVED & provenance.keys()
    if reserved:
        raise ValueError(f"provenance may not be called {', '.join(sorted(reserved))}: the file format uses that name")
    if not isinstance(scaling, LayerScaling | HeadScaling):
        raise ValueError(f"a {type(scaling).__name__} has no factor file; save a LayerScaling or a HeadScaling")
    if isinstance(scaling, HeadScaling) and scaling.is_identity:
        scaling = LayerScaling.identity(scaling.num_layers)
    layers = scaling.layers if isinstance(scaling, HeadScaling) else scaling
    content: dict[str, Any] = {"format": _FORMAT, "version": 1 + isinstance(scaling, HeadScaling)}
    if isinstance(layers, LayerScaling):
        content["scheme"] = layers.scheme
        if isinstance(layers, ExtendedScaling):
            content |= {"extension": layers.extension, "combine": layers.combine}
        content["factors"] = list(layers.factors)
        content["temperatures"] = None if layers.temperatures is None else list(layers.temperatures)
        if layers.bands is not None:
            content |= {"version": 3, "bands": layers.bands}
    if isinstance(scaling, HeadScaling):
        content |= {"head_temperatures": scaling.temperatures, "head_gains": scaling.gains}
        content |= {} if scaling.mlp_gains is None else {"mlp_gains": scaling.mlp_gains}
        if scaling.factors is not None:
            content |= {"version": 4, "head_factors": scaling.factors, "head_scheme": scaling.scheme}
    write_whole(path, f"{json.dumps(content | provenance, indent=1, allow_nan=False)}\n")


def load_factors(path: str | Path, lm: LM | None = None) -> Scaling:
    """Read a scaling from a factor file, or one that ships by its name: "smollm2-135m/ga".

    Parameters
    ----------
    lm : LM, optional
        Where the file says that its scaling was found on another model, a UserWarning names both.

    Raises
    ------
    ValueError
        Not a factor file, a newer version, or a field that is missing or not valid; names file and field.
    FileNotFoundError
        Neither a file nor the name of one that ships; names those that do.
    """
    content = read_factors(path)
    if lm is not None and content.get("fingerprint", lm.fingerprint) != lm.fingerprint:
        warnings.warn(
            f"{path} was found on {content.get('model', 'a model')} with fingerprint {content['fingerprint']}, not on "
            f"this {lm.name} with {lm.fingerprint}: other weights, settings, tokenizer or precision. What it says of "
            "accuracy need not hold; measure before you rely on it",
            stacklevel=2,
        )
    try:
        heads = {name.removeprefix("head_"): content[name] for name in _HEAD_KEYS if name in content}
        if not heads and content["version"] != 2:
            return _layers(content)
        return HeadScaling(**heads, layers=_layers(content) if "factors" in content else None)
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def shipped() -> list[str]:
    """Names of the factor files that ship with the package: model/what they are."""
    return sorted(f"{model.name}/{file.name[:-5]}" for model in _SHIPPED.iterdir() for file in model.iterdir())


def read_factors(path: str | Path) -> dict[str, Any]:
    """A factor file's content, provenance included: what `load_factors` makes a scaling of."""
    instance("path", path, str | Path, "a factor file or the name of one that ships")
    try:
        content = json.loads(_found(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a factor file: {error}") from error
    if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
        raise ValueError(f'{path} is not a factor file: it lacks "format": "{_FORMAT}"')
    if content.get("version") not in _VERSIONS:
        raise ValueError(
            f"{path} has version {content.get('version')!r}; this lrs_utils reads versions "
            f"{', '.join(map(str, _VERSIONS))}"
        )
    return dict(content)


def without_numbers(content: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance in a factor file's content, as `save_factors` takes it."""
    return {name: value for name, value in content.items() if name not in _RESERVED}


def _found(path: str | Path) -> Any:
    if Path(path).exists():
        return Path(path)
    named = _SHIPPED / f"{path}.json"
    if named.is_file():
        return named
    raise FileNotFoundError(f"{path} is no file; by name there are {', '.join(shipped())}")


def _layers(content: Mapping[str, Any]) -> LayerScaling:
    numbers = content["factors"], content["scheme"], content.get("temperatures"), content.get("bands")
    if {"extension", "combine"} & content.keys() or content["scheme"] == DYNAMIC:
        return ExtendedScaling(
            *numbers, extension=content.get("extension", 1.0), combine=content.get("combine", COMBINATIONS[0])
        )
    return LayerScaling(*numbers)


def read_key(key: str) -> Scaling:
    """The scaling that computes what a key is of."""
    return HeadScaling.from_key(key) if ";" in key else LayerScaling.from_key(key)
