import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from lrs_utils.tasks import Probe, Question, Suite, kv_retrieval
from lrs_utils.tasks.kv import kv_probe

OFFICIAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "lost-in-the-middle"


def authors_prompt(records, key):
    """The prompt as the authors' scripts build it (fact sheet 3.12), written down independently of `kv`."""
    lines = []
    for i, (k, v) in enumerate(records):
        lines.append(("{" if i == 0 else " ") + f'"{k}": "{v}"' + ("}" if i == len(records) - 1 else ","))
    data = "\n".join(lines)
    return (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f'JSON data:\n{data}\n\nKey: "{key}"\nCorresponding value:'
    )


def pairs_of(probe):
    return list(json.loads(re.search(r"\{.*\}", probe.context, re.DOTALL)[0]).items())


@pytest.mark.parametrize("keys", ["uuid", "short"])
def test_the_prompt_is_the_authors_byte_for_byte(keys):
    suite = kv_retrieval(n_pairs=7, n_contexts=3, seed=1, keys=keys)
    for probe in suite.probes:
        pairs = pairs_of(probe)
        assert len(pairs) == 7
        for question, (key, value) in zip(probe.questions, pairs, strict=True):
            assert probe.context + question.prompt == authors_prompt(pairs, key)
            assert question.answer == value


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the official files are not at hand")
@pytest.mark.parametrize("n", [75, 140])
def test_official_records_give_the_same_layout_and_prompt(n):
    with gzip.open(OFFICIAL / f"kv-retrieval-{n}_keys.jsonl.gz", "rt") as lines:
        records = [json.loads(line) for line in lines]
    generated = kv_retrieval(n_pairs=n, n_contexts=1).probes[0]
    assert len(generated.context) == len(kv_probe(records[0]["ordered_kv_records"], [0]).context)
    for record in records[:50]:
        pairs = record["ordered_kv_records"]
        gold = [key for key, _ in pairs].index(record["key"])
        probe = kv_probe(pairs, [gold])
        assert probe.context + probe.questions[0].prompt == authors_prompt(pairs, record["key"])
        assert probe.questions[0].answer == record["value"]


def test_uuids_are_version_4_and_short_keys_are_short():
    uuid4 = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    for key, value in pairs_of(kv_retrieval(30, 1, keys="uuid").probes[0]):
        assert re.fullmatch(uuid4, key)
        assert re.fullmatch(uuid4, value)
    pairs = pairs_of(kv_retrieval(200, 1, keys="short").probes[0])
    assert all(re.fullmatch("([b-z][aeiou]){3}", key) and re.fullmatch("[1-9][0-9]{4}", v) for key, v in pairs)
    assert len({key for key, _ in pairs}) == len({value for _, value in pairs}) == 200


def test_a_suite_is_deterministic_and_longer_ones_extend_it():
    a, b, longer = (kv_retrieval(5, n, seed=3) for n in (4, 4, 6))
    assert a == b
    assert a.fingerprint == b.fingerprint
    assert longer.probes[:4] == a.probes
    assert kv_retrieval(**a.recipe) == a


def test_seeds_share_no_context():
    contexts = [{p.context for p in kv_retrieval(5, 20, seed=seed).probes} for seed in (0, 1, 10_000)]
    assert not contexts[0] & contexts[1]
    assert not contexts[0] & contexts[2]


def test_depths_run_from_begin_to_end():
    np.testing.assert_allclose(kv_retrieval(5, 1).depths, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(kv_retrieval(9, 2, positions=[8, 0]).depths, [1, 0])


def test_an_outcome_is_filed_under_context_and_question():
    whole, part = kv_retrieval(4, 2), kv_retrieval(4, 2, positions=[1, 3])
    assert part.probes[0].keys == (whole.probes[0].keys[1], whole.probes[0].keys[3])
    assert len({key for probe in whole.probes for key in probe.keys}) == 8
    changed = Probe(whole.probes[0].context + " ", whole.probes[0].questions, 4)
    assert not set(changed.keys) & set(whole.probes[0].keys)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="keys is 'long'; choose one of uuid, short"):
        kv_retrieval(keys="long")
    with pytest.raises(ValueError, match="n_pairs is 0"):
        kv_retrieval(0)
    with pytest.raises(ValueError, match="n_contexts is -1"):
        kv_retrieval(2, -1)
    with pytest.raises(ValueError, match=r"position 5 is outside the 5 pairs \(0 to 4\)"):
        kv_retrieval(5, positions=[0, 5])
    with pytest.raises(ValueError, match="no questions"):
        kv_retrieval(5, positions=[])
    probes = tuple(Probe("c", (Question("q", "", "a", position),), 3) for position in (0, 1))
    with pytest.raises(ValueError, match="context 1 asks at depths"):
        Suite("mixed", probes)
