import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import reproduce as batch
from reproduce import main

PARAMETERS = 'profile: str = "cpu"  # a file\nn: int = 1  # a number\nfresh: bool = False  # again'
FIGURE = (
    "import os, pathlib\nout = pathlib.Path(os.environ['LRS_RESULTS']) / 'figures'\n"
    "out.mkdir(exist_ok=True)\n(out / f'01_{profile}.svg').write_text(f'<svg>{n}</svg>')"
)
FACTORS = (
    "found = out.parent / 'lrs_utils' / 'data' / 'factors' / 'm' / 'ga.json'\n"
    "found.parent.mkdir(parents=True, exist_ok=True)\nfound.write_text('{}')"
)


def notebook(folder, name, *cells):
    parameters = nbformat.v4.new_code_cell(PARAMETERS)
    parameters.metadata["tags"] = ["parameters"]
    book = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, folder / f"{name}.ipynb")


@pytest.fixture
def collection(tmp_path, monkeypatch):
    """A repository of three notebooks, of which the second fails."""
    profile = tmp_path / "notebooks" / "profiles" / "smoke"
    profile.mkdir(parents=True)
    (tmp_path / "lrs_utils").mkdir()
    (tmp_path / "figures").mkdir()
    for number in ("01", "02", "03"):
        (profile / f"{number}.yaml").write_text("profile: smoke\nn: 1\n")
    (tmp_path / "figures" / "01_smoke.svg").write_text("<svg>2</svg>")
    notebook(tmp_path / "notebooks", "01_draws", FIGURE, FACTORS)
    notebook(tmp_path / "notebooks", "02_fails", "x = 1", "raise ValueError('no such thing')")
    notebook(tmp_path / "notebooks", "03_prints", "print('a long step: 40% 4/10 [00:01<00:02, 3it/s] note')")
    monkeypatch.setattr(batch, "ROOT", tmp_path)
    return tmp_path


def test_a_failing_notebook_stops_nothing_and_is_told(collection, capfd, monkeypatch):
    monkeypatch.setattr(batch, "_SECONDS_BETWEEN_LINES", 0.0)
    sources = {path.name: path.read_bytes() for path in (collection / "notebooks").glob("*.ipynb")}
    assert main(["--profile", "smoke", "-p", "n=2"]) == 1
    printed = capfd.readouterr().out
    folder = collection / "build" / "runs" / "smoke-n=2"
    ended = [line.split() for line in printed.splitlines()[-4:-1]]
    assert [(name, status) for name, _, status, *_ in ended] == [
        ("01_draws", "ok"), ("02_fails", "failed"), ("03_prints", "ok")
    ]  # fmt: skip
    assert "02_fails: failed: ValueError: no such thing after" in printed
    assert "03_prints: a long step 40 %, 00:02 left note" in printed
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["parameters"]["01_draws"] == {"profile": "smoke", "n": 2}
    assert manifest["command"].endswith("--profile smoke -p n=2")
    assert list(manifest["sha256"]) == ["figures/01_smoke.svg", "lrs_utils/data/factors/m/ga.json"]
    index = (folder / "index.html").read_text()
    assert '<a href="02_fails.html">' in index
    assert "the same" in index
    assert (folder / "committed-01_smoke.svg").exists()
    assert {path.name: path.read_bytes() for path in (collection / "notebooks").glob("*.ipynb")} == sources


def test_resuming_skips_what_finished_with_the_same_parameters_and_code(collection, capfd):
    assert main(["--profile", "smoke"]) == 1
    notebook(collection / "notebooks", "02_fails", "print('mended')")
    capfd.readouterr()
    assert main(["--profile", "smoke", "--resume"]) == 0
    printed = capfd.readouterr().out
    assert "01_draws: finished before, skipped" in printed
    assert "02_fails: done" in printed
    notebook(collection / "notebooks", "01_draws", FIGURE, "print('changed')")
    assert main(["--profile", "smoke", "--resume", "--jobs", "2"]) == 0
    printed = capfd.readouterr().out
    assert "01_draws: done" in printed
    assert "02_fails: finished before, skipped" in printed
    for name, content in (("new.py", b"# new"), ("found.json", b"{}"), ("weights.safetensors", b"\xff")):
        (collection / "lrs_utils" / name).write_bytes(content)
        assert main(["--profile", "smoke", "--resume", "--only", "03"]) == 0
        assert "03_prints: done" in capfd.readouterr().out
    manifest = json.loads((collection / "build" / "runs" / "smoke" / "manifest.json").read_text())
    assert [done["notebook"] for done in manifest["notebooks"]] == ["01_draws", "02_fails", "03_prints"], (
        "none forgotten"
    )


def test_a_run_folder_may_be_given_relative_and_a_killed_notebook_is_told(collection, capfd, monkeypatch):
    notebook(collection / "notebooks", "02_fails", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)")
    monkeypatch.chdir(collection)
    for _ in range(2):  # the second time over the first
        assert main(["--profile", "smoke", "--only", "01", "02", "--out", "runs/mine"]) == 1
        assert "02_fails: failed: killed by signal 9" in capfd.readouterr().out
    assert (collection / "runs" / "mine" / "figures" / "01_smoke.svg").exists()
    assert not (collection / "notebooks" / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "smok"], "there is no profile 'smok'; there are smoke"),
        (["--profile", "smoke", "--only", "09"], "there is no notebook '09'; there are 01_draws"),
        (["--profile", "smoke", "-p", "m=2"], "none of the chosen notebooks has a parameter 'm'; they have fresh, n"),
        (["--profile", "smoke", "-p", "profile=gpu"], "a profile is given as --profile"),
        (["--profile", "smoke", "-p", "n"], "-p 'n' is not of the form NAME=VALUE"),
        (["--profile", "smoke", "-p", "n=[1, 2"], "-p 'n=[1, 2': the value is no YAML (expected ',' or ']', but got"),
        (["--profile", "smoke", "--jobs", "0"], "--jobs is 0"),
        (["--profile", "smoke", "--verify"], "--verify runs what is committed: profile cpu as it is"),
    ],
)
def test_a_wrong_command_line_runs_nothing(collection, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err
    assert not (collection / "build").exists()


def test_a_folder_that_is_no_run_folder_is_left_as_it_is(collection, capsys):
    mine = collection / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    with pytest.raises(SystemExit, match="2"):
        main(["--profile", "smoke", "--out", str(mine)])
    assert "is no run folder" in capsys.readouterr().err
    (mine / "manifest.json").write_text('{"name": "of something else"}')
    with pytest.raises(SystemExit, match="2"):
        main(["--profile", "smoke", "--out", str(mine)])
    assert (mine / "thesis.txt").read_text() == "all of it"


def test_an_interrupt_stops_the_running_notebook_and_tells_what_was_done(collection):
    ran, never = (str(collection / name) for name in ("pid", "never"))
    code = f"import os, pathlib, time\npathlib.Path({ran!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    notebook(collection / "notebooks", "02_fails", code)
    notebook(collection / "notebooks", "03_prints", f"open({never!r}, 'w')")
    command = (
        "import pathlib, signal, sys; sys.path.insert(0, sys.argv[2]); import reproduce; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored where tests run in the background
        "reproduce.ROOT = pathlib.Path(sys.argv[1]); sys.exit(reproduce.main(['--profile', 'smoke']))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", command, collection, Path(batch.__file__).parent], stdout=subprocess.PIPE, text=True
    )
    waited = time.monotonic()
    while not Path(ran).exists() or not Path(ran).read_text():
        assert time.monotonic() - waited < 120
        time.sleep(0.1)
    parent.send_signal(signal.SIGINT)
    printed, _ = parent.communicate(timeout=60)
    assert parent.returncode == 130
    *_, first, second, third, _, why = printed.splitlines()
    assert [line.split()[::2][:2] for line in (first, second)] == [["01_draws", "ok"], ["02_fails", "failed"]]
    assert third.endswith("not run")
    assert "Traceback" not in printed
    assert why.startswith("interrupted: what was measured is in the ledger")
    assert not Path(never).exists()
    kernel, waited = int(Path(ran).read_text()), time.monotonic()
    while Path(f"/proc/{kernel}").exists():  # no kernel goes on by itself
        assert time.monotonic() - waited < 30
        time.sleep(0.1)


def test_a_full_disk_ends_with_a_sentence_and_a_summary(collection, capsys, monkeypatch):
    write, calls = batch._write_manifest, []

    def full(*given):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        write(*given)

    monkeypatch.setattr(batch, "_write_manifest", full)
    assert main(["--profile", "smoke", "--only", "01", "03"]) == 1
    *_, first, second, _, why = capsys.readouterr().out.splitlines()
    assert first.split()[2] == "ok"
    assert second.split()[0] == "03_prints"
    assert why == "stopped: [Errno 28] No space left on device; make room and go on with --resume"


def test_a_folder_that_can_not_be_is_refused_with_a_sentence(collection, capsys):
    (collection / "file").write_text("mine")
    for out, message in (("file", "file is a file; give a folder"), ("file/below", "the run folder can't be made")):
        with pytest.raises(SystemExit):
            main(["--profile", "smoke", "--only", "01", "--out", str(collection / out)])
        assert message in capsys.readouterr().err
    assert (collection / "file").read_text() == "mine"
