import json
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lrs_utils
from lrs_utils import ExtendedScaling, HeadScaling, LayerScaling, load_factors, load_lm, save_factors
from lrs_utils.notebook import ROOT
from lrs_utils.scaling.files import read_factors

SHIPPED = Path(lrs_utils.__file__).parent / "data" / "factors"
NAMES = sorted(f"{path.parent.name}/{path.stem}" for path in SHIPPED.glob("*/*.json"))
GAINS = [[1.3, 0.7], [1.0, 2.0], [0.4, 1.1]]
BEGIN = '{"format": "lrs-factors", "version": 2'

positive = st.floats(1e-3, 1e3) | st.just(1.0)


@st.composite
def layer_scalings(draw, n_layers):
    def each():
        return draw(st.lists(positive, min_size=n_layers, max_size=n_layers))

    scheme = draw(st.sampled_from(["pi", "ntk", "yarn", "dynamic_ntk"]))
    options = {"extension": draw(st.floats(1, 16)), "combine": draw(st.sampled_from(["multiply", "divide"]))}
    return ExtendedScaling(each(), scheme, each() if draw(st.booleans()) else None, **options)


@st.composite
def scalings(draw):
    n_layers, n_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    layers = draw(layer_scalings(n_layers))
    if draw(st.integers(0, 3)) == 0:
        return layers
    rows = st.lists(
        st.lists(positive, min_size=n_heads, max_size=n_heads), min_size=n_layers, max_size=n_layers
    ) | st.just(np.ones((n_layers, n_heads)))
    given = {name: draw(rows) if draw(st.booleans()) else None for name in ("temperatures", "gains")}
    given["mlp_gains"] = draw(st.lists(positive, min_size=n_layers, max_size=n_layers)) if draw(st.booleans()) else None
    if all(values is None for values in given.values()) or draw(st.booleans()):
        given["layers"] = layers
    return HeadScaling(**given)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scalings())
def test_any_scaling_comes_back_from_its_file(tmp_path, scaling):
    save_factors(tmp_path / "f.json", scaling, model="tiny", held_out={"accuracy": 0.5})
    again = load_factors(tmp_path / "f.json")
    assert (again.key, again.settings) == (scaling.key, scaling.settings)
    assert again == scaling or scaling.is_identity  # no numbers of heads are no numbers of layers
    content = read_factors(tmp_path / "f.json")
    assert (content["model"], content["held_out"]) == ("tiny", {"accuracy": 0.5})
    # what a reader of version 1 knows is written as it knows it
    assert content["version"] == (1 if isinstance(again, LayerScaling) else 2)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_ship_load_by_name(name):
    scaling = load_factors(name)
    assert scaling == load_factors(SHIPPED / f"{name}.json")
    assert len(scaling.settings) == {"smollm2-135m": 30, "gemma3-270m": 18}[name.partition("/")[0]]
    assert read_factors(name)["model"]


def test_files_of_version_1_ship_under_the_names_they_had():
    of_version_1 = [name for name in NAMES if read_factors(name)["version"] == 1]
    assert {"ga", "ga-all-depths", "layers-best", "layers-five-percent", "layers-general", "paper"} <= {
        name.removeprefix("smollm2-135m/") for name in of_version_1
    }
    assert all(isinstance(load_factors(name), LayerScaling) for name in of_version_1)


def test_an_unknown_name_lists_those_there_are(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as error:
        load_factors("smollm2-135m/nothing")
    assert str(error.value).startswith("smollm2-135m/nothing is no file; by name there are ")
    assert str(error.value).split("there are ")[1].split(", ") == NAMES
    monkeypatch.chdir(tmp_path)  # a file of one's own comes first
    save_factors(Path("smollm2-135m") / "paper.json", LayerScaling((7.0,)))
    assert len(load_factors("smollm2-135m/paper").settings) == 30
    assert load_factors("smollm2-135m/paper.json") == LayerScaling((7.0,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BEGIN + "}", "needs temperatures, gains, mlp_gains, factors or layers; all are None"),
        (BEGIN + ', "head_temperatures": null, "head_gains": null}', "all are None"),
        (BEGIN + ', "head_gains": [[1.0, -2.0]]}', r"gains\[0\]\[1\] is -2.0; it must be a positive finite number"),
        (BEGIN + ', "head_gains": [[1.0, "x"]]}', r"gains\[0\]\[1\] is 'x'"),
        (BEGIN + ', "head_temperatures": [1.0, 2.0]}', r"temperatures has shape \(2,\); it must be \(layers, heads\)"),
        (BEGIN + ', "head_gains": [[1.0, 2.0], [3.0]]}', r"gains must be numbers of shape \(layers, heads\)"),
        (BEGIN + ', "head_gains": {"a": 1}}', r"gains must be numbers of shape \(layers, heads\)"),
        (BEGIN + ', "mlp_gains": [NaN]}', r"mlp_gains\[0\] is nan"),
        (BEGIN + ', "head_gains": [[2.0]], "mlp_gains": [1.0, 2.0]}', r"the shapes don't agree: gains \(1, 1\)"),
        (BEGIN + ', "head_gains": [[2.0]], "factors": [1.0]}', "lacks the field 'scheme'"),
        (BEGIN + ', "head_gains": [[2.0]], "factors": [1.0, 2.0], "scheme": "pi"}', r"gains \(1, 1\), layers \(2,\)"),
        (BEGIN + ', "head_gains": [[2.0]], "factors": [0.0], "scheme": "pi"}', r"factors\[0\] is 0"),
        (BEGIN + ', "head_gains": [[2.0]], "factors": [2.0], "scheme": "x"}', "scheme 'x' is unknown"),
        (
            '{"format": "lrs-factors", "version": 5, "head_gains": [[2.0]]}',
            "version 5; this lrs_utils reads versions 1",
        ),
        ('{"format": "lrs-factors", "head_gains": [[2.0]]}', "version None"),
        ('{"format": "lrs-factors", "version": 1, "scheme": "pi"}', "lacks the field 'factors'"),
        (BEGIN + ', "head_gains": [[2.0]', "is not a factor file: "),
        ('{"version": 2, "head_gains": [[2.0]]}', "is not a factor file: it lacks"),
        ("", "is not a factor file"),
        ("3", "is not a factor file"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_field(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.json.*{message}"):
        load_factors(path)


def test_a_file_that_is_no_text_is_refused_with_its_name(tmp_path):
    (tmp_path / "bad.json").write_bytes(b'{"format": "lrs-\xff"')
    with pytest.raises(ValueError, match=r"bad\.json is not a factor file: .*utf-8"):
        load_factors(tmp_path / "bad.json")


def test_a_file_cut_anywhere_is_refused_with_its_name(tmp_path):
    save_factors(tmp_path / "whole.json", HeadScaling(gains=GAINS, layers=LayerScaling((1.2, 1.0, 1.0))))
    whole, cut = (tmp_path / "whole.json").read_text(), tmp_path / "cut.json"
    for end in range(len(whole.rstrip())):
        cut.write_text(whole[:end])
        with pytest.raises(ValueError, match=r"cut\.json is not a factor file"):
            load_factors(cut)


@pytest.mark.parametrize("name", ["format", "version", "factors", "head_gains", "head_temperatures", "mlp_gains"])
def test_provenance_may_not_stand_where_numbers_do(tmp_path, name):
    path = tmp_path / "f.json"
    save_factors(path, HeadScaling(gains=GAINS))
    with pytest.raises(ValueError, match=f"provenance may not be called {name}: the file format uses that name"):
        save_factors(path, HeadScaling(gains=GAINS), **{name: 1})
    with pytest.raises(ValueError, match="Out of range float"):
        save_factors(path, HeadScaling(mlp_gains=[2.0]), accuracy=math.nan)
    assert load_factors(path) == HeadScaling(gains=GAINS), "a failed save leaves the old file"
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_numbers_of_heads_are_rows_of_layers(tmp_path):
    save_factors(tmp_path / "f.json", HeadScaling(gains=GAINS))
    content = json.loads((tmp_path / "f.json").read_text())
    assert content == {"format": "lrs-factors", "version": 2, "head_temperatures": None, "head_gains": GAINS}


def test_a_file_nested_too_deeply_is_refused_by_name(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"deep.json is not a factor file"):
        load_factors(tmp_path / "deep.json")


def test_a_file_of_another_model_is_told_apart_where_the_model_is_given(tiny, tmp_path):
    other = load_lm("tiny-mistral", dtype="float32", device="cpu")
    save_factors(tmp_path / "f.json", LayerScaling((1.2, 1.0)), model=tiny.name, fingerprint=tiny.fingerprint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_factors(tmp_path / "f.json", tiny) == load_factors(tmp_path / "f.json")
        save_factors(tmp_path / "bare.json", LayerScaling((1.2, 1.0)))
        load_factors(tmp_path / "bare.json", other)
    message = f"f.json was found on tiny-llama with fingerprint {tiny.fingerprint}, not on this tiny-mistral"
    with pytest.warns(UserWarning, match=message):
        assert load_factors(tmp_path / "f.json", other).factors == (1.2, 1.0)


@pytest.mark.parametrize(("number", "model"), [(0, "smollm2-135m"), (1, "gemma3-270m")])
def test_the_general_scaling_is_the_one_that_notebook_11_judged(number, model):
    results, scaling = ROOT / "data" / "results", load_factors(f"{model}/general")
    chosen = pd.read_csv(results / f"objectives_{number}_dose.csv", skiprows=1)
    assert chosen["scaling"].iloc[-1] == scaling.key
    judged = pd.read_csv(results / f"objectives_{number}_judged.csv", skiprows=1)
    judged = judged[judged["objective"] == judged["objective"].iloc[-1]]
    written = {row["task"]: row["found"] for row in read_factors(f"{model}/general")["test"] if row["task"] != "text"}
    assert written == pytest.approx(dict(zip(judged["test"], judged["found"], strict=True)))
