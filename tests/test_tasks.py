import functools
import gzip
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from lrs_utils.tasks import (
    Probe,
    Question,
    Suite,
    copying,
    files,
    general_tasks,
    kv_gold_moved,
    kv_official,
    kv_retrieval,
    lines_retrieval,
    passkey,
    positions_at,
    vary_size,
)
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


def test_positions_nearest_to_depths_take_the_earlier_of_two():
    assert positions_at(5) == [0, 1, 2, 3, 4]
    assert positions_at(20) == [0, 5, 9, 14, 19]  # the authors' middle of an even number is the earlier too
    assert positions_at(3) == [0, 1, 2]
    assert positions_at(4, (0, 0.5, 1)) == [0, 1, 3]


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
    with pytest.raises(ValueError, match="no contexts or no questions"):
        kv_retrieval(5, positions=[])


def asked_at(context, *positions, n_items=5):
    return Probe(context, tuple(Question(f"{position}?", "", "a", position) for position in positions), n_items)


def test_contexts_that_ask_at_the_same_depths_have_one_row_of_depths():
    suite = Suite("same", (asked_at("a", 4, 0), asked_at("b", 8, 0, n_items=9)))
    assert suite.depths.tolist() == [1, 0]
    assert suite.asked.tolist() == [[True, True], [True, True]]
    assert suite.n_questions == 2


def test_contexts_that_ask_at_different_depths_have_a_row_each():
    suite = Suite("other", (asked_at("a", 0, 4), asked_at("b", 4, 0)))
    assert suite.depths.tolist() == [[0, 1], [1, 0]]
    assert suite.asked.all()


def test_where_a_context_has_fewer_questions_depths_are_nan_and_nothing_is_asked():
    suite = Suite("ragged", (asked_at("a", 1), asked_at("b", 0, 2, 4), asked_at("c", 3, 1, n_items=4)))
    nan = np.nan
    np.testing.assert_array_equal(suite.depths, [[0.25, nan, nan], [0, 0.5, 1], [1, 1 / 3, nan]])
    assert suite.asked.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    assert suite.asked.dtype == bool
    assert suite.n_questions == 3
    np.testing.assert_array_equal(suite.asked, ~np.isnan(suite.depths))


def test_a_suite_needs_contexts_and_each_a_question():
    with pytest.raises(ValueError, match="suite none has no contexts or no questions; give at least one of each"):
        Suite("none", ())
    with pytest.raises(ValueError, match="suite mute: context 1 has no questions; ask one or leave it out"):
        Suite("mute", (asked_at("a", 1), asked_at("b")))


def test_parts_share_no_context_and_repeat_from_their_seed():
    suite = kv_retrieval(3, 10, keys="short")
    parts = suite.parts(5, 3, 1, seed=4)
    assert [len(part.probes) for part in parts] == [5, 3, 1]
    assert len({probe.context for part in parts for probe in part.probes}) == 9
    assert [part.name for part in parts] == ["kv-short-3-part-0", "kv-short-3-part-1", "kv-short-3-part-2"]
    for part in parts:
        assert part.probes == tuple(suite.probes[index] for index in part.recipe["contexts"])
        assert part.recipe.items() > suite.recipe.items()
    [again] = parts[0].parts(2, seed=1)
    assert again.probes == tuple(suite.probes[index] for index in again.recipe["contexts"])
    assert suite.parts(5, 3, 1, seed=4) == parts
    assert suite.parts(5, 3, 1, seed=5) != parts
    assert suite.parts(5, seed=4) == parts[:1]
    assert suite.parts(5, 5, seed=4)[1].probes[:3] == parts[1].probes


def test_parts_that_can_not_be_are_refused():
    suite = kv_retrieval(3, 10, keys="short")
    with pytest.raises(ValueError, match=r"kv-short-3 has 10 contexts, parts of \[8, 3\] need 11; add contexts or ask"):
        suite.parts(8, 3, seed=0)
    with pytest.raises(ValueError, match=r"parts of \[8, 0\] contexts; give the number of each part, at least 1"):
        suite.parts(8, 0, seed=0)
    with pytest.raises(ValueError, match=r"parts of \[\] contexts"):
        suite.parts(seed=0)
    twice = Suite("twice", (asked_at("a", 1), asked_at("b", 0), asked_at("c", 1), asked_at("b", 1)))
    with pytest.raises(ValueError, match=r"suite twice: contexts 1 and 3 have the same text .* the questions of both"):
        twice.parts(1, seed=0)


def gold_of(suite):
    return [probe.questions[0] for probe in suite.probes]


def test_the_gold_pair_moves_and_nothing_else_does():
    begin, middle, end = kv_gold_moved(5, 4, seed=2, keys="short", positions=[0, 2, 4])
    assert [s.depths.tolist() for s in (begin, middle, end)] == [[0.0], [0.5], [1.0]]
    for position, suite in ((0, begin), (2, middle), (4, end)):
        for probe, first, shared in zip(
            suite.probes, begin.probes, kv_retrieval(5, 4, 2, keys="short").probes, strict=True
        ):
            pairs, at_first = pairs_of(probe), pairs_of(first)
            assert pairs[position] == at_first[0]
            assert pairs[:position] + pairs[position + 1 :] == at_first[1:]
            assert sorted(pairs) == sorted(pairs_of(shared))
            assert (probe.questions[0].prompt, probe.questions[0].answer) == (
                first.questions[0].prompt, first.questions[0].answer
            )  # fmt: skip
    assert len({q.prompt for q in gold_of(begin)}) == 4


def official_folder(tmp_path, records, name="kv-retrieval-3_keys.jsonl.gz"):
    with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(record) for record in records) + "\n")
    return tmp_path


GOOD = {"ordered_kv_records": [["a", "1"], ["b", "2"], ["c", "3"]], "key": "b", "value": "2"}


def test_official_records_are_read_from_the_users_folder(tmp_path):
    other = {"ordered_kv_records": [["d", "4"], ["e", "5"], ["f", "6"]], "key": "f", "value": "6"}
    folder = official_folder(tmp_path, [GOOD, other])
    suite = kv_official(3, 1, first=1, folder=folder)
    assert pairs_of(suite.probes[0]) == [("d", "4"), ("e", "5"), ("f", "6")]
    [moved] = kv_gold_moved(3, 2, keys="official", positions=[0], folder=folder)
    assert [q.answer for q in gold_of(moved)] == ["2", "6"]
    assert pairs_of(moved.probes[1]) == [("f", "6"), ("d", "4"), ("e", "5")]
    with pytest.raises(ValueError, match="has 2 records; first 1 and n_contexts 2 ask for more"):
        kv_official(3, 2, first=1, folder=folder)
    with pytest.raises(FileNotFoundError, match=r"has no kv-retrieval-75_keys\.jsonl\.gz"):
        kv_official(75, folder=folder)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"key": "b", "value": "2"}, "line 2 has no field 'ordered_kv_records'"),
        (GOOD | {"key": 5}, "line 2: field 'key' is 5, not str"),
        (GOOD | {"value": ""}, "line 2: field 'value' is empty"),
        (GOOD | {"value": "3"}, "line 2: fields 'key' and 'value' are no pair"),
        (GOOD | {"key": "z"}, "line 2: fields 'key' and 'value' are no pair"),
        (GOOD | {"ordered_kv_records": [["b", "2"], ["b", "2"], ["c", "3"]]}, "has the key 'b' twice"),
        (GOOD | {"ordered_kv_records": [["b", "2"]]}, "line 2: field 'ordered_kv_records' has 1 pairs, not 3"),
        (GOOD | {"ordered_kv_records": [["a"], ["b", "2"], ["c", "3"]]}, "something other than"),
        ([1], "line 2 is no JSON object"),
    ],
)
def test_a_bad_record_is_named_with_file_line_and_field(tmp_path, record, message):
    folder = official_folder(tmp_path, [GOOD, record])
    with pytest.raises(ValueError, match=message) as error:
        kv_official(3, 2, folder=folder)
    assert "kv-retrieval-3_keys.jsonl.gz, line 2" in str(error.value)


def test_damaged_files_say_where_they_break(tmp_path):
    path = official_folder(tmp_path, [GOOD] * 2000) / "kv-retrieval-3_keys.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"kv-retrieval-3_keys\.jsonl\.gz breaks off after line \d+"):
        kv_official(3, 1, folder=tmp_path)
    path.write_bytes(whole[:40] + b"\xff" * 8 + whole[48:])
    with pytest.raises(ValueError, match=r"kv-retrieval-3_keys\.jsonl\.gz breaks off after line \d+"):
        kv_official(3, 1, folder=tmp_path)
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode() + b"\n\xff\xfe{}\n"))
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        kv_official(3, 1, folder=tmp_path)
    path.write_bytes(gzip.compress(b'{"key": \n'))
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        kv_official(3, 1, folder=tmp_path)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The authors' repository as a local server with one small file, and an empty cache."""
    content = gzip.compress(json.dumps(GOOD).encode() + b"\n")
    site = tmp_path / "site" / "kv_retrieval_data"
    site.mkdir(parents=True)
    (site / "kv-retrieval-3_keys.jsonl.gz").write_bytes(content)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "site")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(files, "_BASE", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("LRS_CACHE", str(tmp_path / "cache"))

    def expect(sha256):
        monkeypatch.setitem(files._OFFICIAL, "kv-retrieval-3_keys.jsonl.gz", sha256)

    expect(hashlib.sha256(content).hexdigest())
    yield server, expect, tmp_path / "cache" / "lost-in-the-middle"
    server.shutdown()
    server.server_close()


def test_official_files_are_fetched_once_and_checked(served):
    server, _, folder = served
    assert pairs_of(kv_official(3, 1).probes[0])[0] == ("a", "1")
    server.shutdown()
    server.server_close()
    assert len(kv_official(3, 1).probes) == 1  # from the cache
    assert [file.name for file in folder.iterdir()] == ["kv-retrieval-3_keys.jsonl.gz"]


def test_a_download_that_brings_something_else_leaves_no_file(served):
    server, expect, folder = served
    expect("0" * 64)
    with pytest.raises(OSError, match=r"could not be fetched.*give its folder"):
        kv_official(3, 1)
    assert not list(folder.iterdir())
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="could not be fetched"):
        kv_official(3, 1)
    assert not list(folder.iterdir())
    with pytest.raises(ValueError, match=r"kv-retrieval-300_keys\.jsonl\.gz is not fetched: its hash is not known"):
        kv_official(300)


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the official files are not at hand")
@pytest.mark.parametrize("n", [75, 140])
def test_official_files_are_those_whose_hash_is_pinned(n):
    name = f"kv-retrieval-{n}_keys.jsonl.gz"
    assert hashlib.sha256((OFFICIAL / name).read_bytes()).hexdigest() == files._OFFICIAL[name]
    assert len(kv_official(n, folder=OFFICIAL, positions=[0]).probes) == 500


def test_lines_are_the_release_s_prompt_and_every_line_can_be_asked():
    suite = lines_retrieval(12, 3, seed=1, positions=[11, 0, 5])
    np.testing.assert_allclose(suite.depths, [1, 0, 5 / 11])
    for probe in suite.probes:
        head, record = probe.context.split("Now the record start:\n\n")
        assert head.startswith("Below is a record of lines I want you to remember. Each line begins with 'line <line")
        lines = re.findall(r"line ([a-z]+-[a-z]+): REGISTER_CONTENT is <(\d+)>\n", record)
        assert record == "".join(f"line {name}: REGISTER_CONTENT is <{n}>\n" for name, n in lines) + "\n"
        assert len({name for name, _ in lines}) == 12
        for question in probe.questions:
            name, number = lines[question.position]
            assert question.answer == number
            assert question.prompt == (
                f"Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number."
            )
    assert lines_retrieval(12, 5, seed=1, positions=[11, 0, 5]).probes[:3] == suite.probes
    assert lines_retrieval(**suite.recipe) == suite
    with pytest.raises(ValueError, match=r"position 12 is outside the 12 lines \(0 to 11\)"):
        lines_retrieval(12, 1, positions=[12])


def test_a_passkey_stands_at_its_depth():
    begin, middle, end = passkey(10, 4, seed=1, depths=(0, 0.5, 1))
    for suite, before in ((begin, 0), (middle, 5), (end, 10)):
        np.testing.assert_allclose(suite.depths, [before / 10])
        for probe in suite.probes:
            text = probe.context + probe.questions[0].prompt
            number = probe.questions[0].answer
            info = f"\nThe pass key is {number}. Remember it. {number} is the pass key.\n"
            filler_before, filler_after = text.split(info)
            assert filler_before.count("The grass is green.") == before
            assert filler_after.count("The grass is green.") == 10 - before
            assert text.startswith("There is an important info hidden inside a lot of irrelevant text.")
            assert text.endswith("\nWhat is the pass key? The pass key is")
    assert [q.answer for q in gold_of(begin)] == [q.answer for q in gold_of(end)]
    with pytest.raises(ValueError, match="depth 2 is outside 0 to 1"):
        passkey(depths=(0, 2))
    with pytest.raises(ValueError, match="n_fillers is 0"):
        passkey(0)


def test_copying_asks_for_what_followed_a_cue_that_stands_once_in_each_stretch():
    suite = copying(60, 3, seed=1, n_questions=5)
    assert suite == copying(**suite.recipe)
    assert copying(60, 4, seed=1, n_questions=5).probes[:3] == suite.probes
    assert not {p.context for p in copying(60, 3, seed=2).probes} & {p.context for p in suite.probes}
    for probe in suite.probes:
        words = probe.context.split()
        assert len({*words}) == len(words) == 60
        for stretch, question in enumerate(probe.questions):
            assert probe.context.count(question.prompt) == 1
            assert question.prompt + question.answer in probe.context
            assert len(question.prompt.split()) == len(question.answer.split()) == 3
            assert stretch * 11 <= question.position <= stretch * 11 + 10
            assert question.position == words.index(question.prompt.split()[0])
    with pytest.raises(ValueError, match="n_words is 10"):
        copying(10)


def test_sizes_vary_from_context_to_context_and_contexts_stay_those_of_their_size():
    task = vary_size(functools.partial(kv_retrieval, keys="short"), (3, 5))
    suite = task(n_contexts=5, seed=7)
    assert suite.name == "kv-short-3/5"
    assert [probe.n_items for probe in suite.probes] == [3, 5, 3, 5, 3]
    assert suite.probes[3] == kv_retrieval(5, 5, 7, keys="short").probes[3]
    assert suite.asked.sum() == 19
    assert task(n_contexts=2, seed=7).probes == suite.probes[:2]


def test_the_general_tasks_make_suites_of_their_sizes():
    for name, task in general_tasks().items():
        if name != "documents":  # fetched
            sizes = [len(probe.context) for probe in task(n_contexts=4, seed=0).probes]
            assert sizes == sorted(sizes)
            assert sizes[-1] > 3 * sizes[0]
    assert [*general_tasks({"lines": [3, 5]})] == ["lines"]
