"""The whole collection in one command: `python tools/reproduce.py --profile smoke`.

Each notebook runs under papermill in its own process and writes into a run folder, never over its source. A notebook
that fails doesn't stop the others. The folder's manifest.json says what was run, with which settings and code, and with
what result; index.html shows it. Given the path of an executed notebook, it prints what that one's summary printed.
"""

import argparse
import hashlib
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from first_screen import fill_first_screen
from verify import compared

from lrs_utils.models.download import write_whole
from lrs_utils.notebook import RESULTS_FOLDER, ROOT, VERIFY, parameters_of, profiles, revision, versions

_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Done:
    """How a notebook's run ended."""

    notebook: str
    status: str  # "ok", "failed" or "not run"
    seconds: float
    error: str  # its first line
    digest: str  # of parameters and code


def main(arguments: Sequence[str]) -> int:
    """Run notebooks as the command line asks; 1 where one failed, 2 for a wrong command line, 130 where interrupted.

    Ctrl-C, or SIGINT to this process, stops the notebooks that are running; the summary says what was finished.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.verify and (options.profile != "cpu" or options.given or options.fresh or options.resume):
        parser.error("--verify runs what is committed: profile cpu as it is, without -p, --fresh and --resume")
    try:
        notebooks = _chosen(options.only, options.profile)
        parameters = _parameters(options, notebooks)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    name = "verify" if options.verify else "-".join([options.profile, *options.given]).replace("/", "-")
    folder = options.out or ROOT / "build" / "runs" / name
    folder = folder.resolve()  # notebooks run elsewhere
    if folder.exists() and not folder.is_dir():
        parser.error(f"--out {folder} is a file; give a folder")
    if folder.exists() and any(folder.iterdir()):
        if not _is_run_folder(folder):
            parser.error(f"{folder} is no run folder; it is left as it is: give another --out")
        if not options.resume:
            shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        results = {done.notebook: done for done in _finished(folder)}
        _write_manifest(folder, options, parameters, results)  # which says that this is a run folder
    except OSError as error:
        parser.error(f"the run folder can't be made: {error}; give another --out")
    running: set[subprocess.Popen[str]] = set()
    lock = threading.Lock()

    def run(path: Path) -> None:
        digest = _digest(path, parameters[path.stem])
        known = results.get(path.stem)
        if known and known.status == "ok" and known.digest == digest and (folder / path.name).exists():
            print(f"{path.stem}: finished before, skipped", flush=True)
            done = known
        else:
            sample = {VERIFY: str(options.seed)} if options.verify else {}
            done = _executed(path, folder, parameters[path.stem], options.jobs, digest, sample, running)
        with lock:
            results[path.stem] = done
            _write_manifest(folder, options, parameters, results)

    status, why = _run_all(run, notebooks, options.jobs, running)
    ended = [results.get(path.stem, Done(path.stem, "not run", 0.0, "", "")) for path in notebooks]
    print(_summary(ended, folder))
    try:
        _write_manifest(folder, options, parameters, results)
        _write_index(folder, ended)
    except OSError as error:
        status, why = status or 1, why or f"{folder} can't be written: {error}"
    if why:
        print(why, flush=True)
        return status
    agree = _agrees(folder, options.seed) if options.verify else True
    return int(not agree or any(done.status != "ok" for done in ended))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python tools/reproduce.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="cpu", help="folder in notebooks/profiles (cpu)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NN", help="numbers or names of notebooks")
    parser.add_argument("-p", dest="given", action="append", default=[], metavar="NAME=VALUE", help="a parameter")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at the same time (1)")
    parser.add_argument("--resume", action="store_true", help="skip what finished with the same parameters and code")
    parser.add_argument("--verify", action="store_true", help="measure a sample of what is committed again and compare")
    parser.add_argument("--seed", type=int, default=0, help="which sample is verified (0)")
    parser.add_argument("--out", type=Path, help="the run folder (build/runs/PROFILE)")
    return parser


def _agrees(folder: Path, seed: int) -> bool:
    """Print how each committed result compares with what was measured again; whether all agree."""
    again = compared(folder, ROOT / "data" / "results", seed)
    if not again:
        print("nothing that is committed was found again: these notebooks have no results")
    for result in again:
        verdict = "agrees" if result.agrees else "DIFFERS"
        print(f"{verdict}  {result.name}: {result.off} of {result.values} values off  {result.note}".rstrip())
    return bool(again) and all(result.agrees for result in again)


def _run_all(
    run: Callable[[Path], None], notebooks: Sequence[Path], jobs: int, running: set[subprocess.Popen[str]]
) -> tuple[int, str]:
    """Run each notebook, `jobs` at a time; the status and a sentence where it ended early, else 0 and nothing."""
    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(run, path) for path in notebooks]):
            future.result()
    except KeyboardInterrupt:
        ended = 130, "interrupted: what was measured is in the ledger; the same command with --resume goes on"
    except OSError as error:
        ended = 1, f"stopped: {error}; make room and go on with --resume"
    else:
        ended = 0, ""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in [*running]:
        process.send_signal(signal.SIGINT)  # papermill ends its kernel
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        process.kill()
    pool.shutdown()
    return ended


def _is_run_folder(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"command", "notebooks", "sha256"} <= manifest.keys()


def _chosen(only: Sequence[str], profile: str) -> list[Path]:
    """Notebooks by number or name; by default all."""
    known = profiles(root=ROOT)
    if profile not in known:
        raise ValueError(f"there is no profile {profile!r}; there are {', '.join(known)}")
    every = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    unknown = [name for name in only if not any(path.stem == name or path.stem[:2] == name for path in every)]
    if unknown:
        raise ValueError(f"there is no notebook {unknown[0]!r}; there are {', '.join(path.stem for path in every)}")
    return [path for path in every if not only or path.stem in only or path.stem[:2] in only]


def _parameters(options: argparse.Namespace, notebooks: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """What papermill gives each notebook: its profile's file, and those of the given parameters that it has."""
    if options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}; it must be at least 1")
    known = {path.stem: set(papermill.inspect_notebook(str(path))) for path in notebooks}
    given = {}
    for text in options.given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"-p {text!r} is not of the form NAME=VALUE")
        if name == "profile":
            raise ValueError("a profile is given as --profile, not by -p")
        if not any(name in names for names in known.values()):
            all_names = sorted(set().union(*known.values()) - {"profile"})
            raise ValueError(f"none of the chosen notebooks has a parameter {name!r}; they have {', '.join(all_names)}")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = str(getattr(error, "problem", error))
            raise ValueError(f"-p {text!r}: the value is no YAML ({reason}); a list is [1, 2], a text 'a'") from error
    fresh = {"fresh": True} if options.fresh else {}
    return {
        name: parameters_of(name, options.profile, ROOT) | {k: v for k, v in (given | fresh).items() if k in names}
        for name, names in known.items()
    }


def _digest(path: Path, parameters: dict[str, Any]) -> str:
    """A hash of what a run depends on: code, parameters, modules beside notebooks, the package with data, versions."""
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]  # type: ignore[no-untyped-call]
    package = [path for path in sorted((ROOT / "lrs_utils").rglob("*")) if path.is_file()]
    files = [path for path in package if path.parent.name != "__pycache__"]
    files += sorted((ROOT / "notebooks").glob("*.py"))
    parts = [json.dumps([parameters, code, versions()]).encode(), *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _executed(
    path: Path,
    folder: Path,
    parameters: dict[str, Any],
    jobs: int,
    digest: str,
    sample: Mapping[str, str],
    running: set[subprocess.Popen[str]],
) -> Done:
    out, start = folder / path.name, time.monotonic()
    command = [sys.executable, "-m", "papermill", str(path), str(out), "--log-output", "--no-progress-bar"]
    command += ["--cwd", str(path.parent), "-y", yaml.safe_dump(parameters)]
    environment = os.environ | {RESULTS_FOLDER: str(folder), "PYTHONUNBUFFERED": "1", **sample}
    if jobs > 1:
        environment |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    print(f"{path.stem}: started", flush=True)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors="replace",
        start_new_session=True,  # Ctrl-C reaches it through this process, once
    )  # fmt: skip
    running.add(process)
    assert process.stdout is not None
    last_line = time.monotonic()
    last = "no output"
    for line in process.stdout:
        last = line.strip() or last
        step = re.match(r"(\S.*?): +(\d+)% (\S+) \[(\S+?)<([^,]+),[^\]]*\](.*)", line)  # of `progress.Progress`
        if step and time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            print(f"{path.stem}: {step[1]} {step[2]} %, {step[5]} left{step[6].rstrip()[:80]}", flush=True)
    failed = process.wait() != 0
    if not failed:
        notebook = nbformat.read(out, as_version=4)  # type: ignore[no-untyped-call]
        fill_first_screen(notebook)
        nbformat.write(notebook, out)  # type: ignore[no-untyped-call]
    running.discard(process)
    seconds = time.monotonic() - start
    killed = f"killed by signal {-process.returncode}" if process.returncode < 0 else last
    error = (_first_error(out) or killed) if failed else ""
    print(f"{path.stem}: {'failed: ' + error if failed else 'done'} after {seconds:.0f} s", flush=True)
    return Done(path.stem, "failed" if failed else "ok", round(seconds, 1), error, digest)


def _executed_cells(path: Path) -> list[Any]:
    """An executed notebook's cells; none if the file isn't whole: papermill may be killed while it writes."""
    try:
        return list(nbformat.read(path, as_version=4).cells)  # type: ignore[no-untyped-call]
    except (OSError, ValueError):
        return []


def _first_error(out: Path) -> str:
    for cell in _executed_cells(out):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return f"{output.ename}: {output.evalue}".partition("\n")[0]
    return ""


def _finished(folder: Path) -> list[Done]:
    path = folder / "manifest.json"
    if not path.exists():
        return []
    return [Done(**record) for record in json.loads(path.read_text(encoding="utf-8"))["notebooks"]]


def _write_manifest(
    folder: Path, options: argparse.Namespace, parameters: Mapping[str, Any], ended: Mapping[str, Done]
) -> None:
    kinds = ("data", "figures", "lrs_utils")  # the last holds found factors
    results = [path for kind in kinds for path in sorted((folder / kind).rglob("*")) if path.is_file()]
    content = {
        "command": "python tools/reproduce.py " + " ".join(_command_line(options)),
        "versions": versions(),
        "code": revision(),
        "parameters": parameters,
        "notebooks": [asdict(ended[name]) for name in sorted(ended)],
        "sha256": {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in results},
    }
    write_whole(folder / "manifest.json", json.dumps(content, indent=1))


def _command_line(options: argparse.Namespace) -> list[str]:
    words = ["--profile", options.profile]
    words += ["--only", *options.only] if options.only else []
    words += [word for given in options.given for word in ("-p", given)]
    return words + ["--fresh"] * options.fresh + ["--verify", "--seed", str(options.seed)] * options.verify


def _write_index(folder: Path, ended: Sequence[Done]) -> None:
    """A page with every executed notebook, and every figure beside the committed one."""
    rows, figures = [], []
    for done in ended:
        executed = folder / f"{done.notebook}.ipynb"
        name = done.notebook
        if _executed_cells(executed):
            from nbconvert import HTMLExporter

            templates = [str(Path(__file__).parent)]
            exporter = HTMLExporter(template_name="page", extra_template_basedirs=templates)  # type: ignore[no-untyped-call]
            body, _ = exporter.from_filename(str(executed))
            executed.with_suffix(".html").write_text(body, encoding="utf-8")
            name = f'<a href="{done.notebook}.html">{done.notebook}</a>'
        cells = (name, f"{done.seconds:.0f}", done.status, html.escape(done.error))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    for path in sorted((folder / "figures").glob("*")):
        committed = ROOT / "figures" / path.name
        same = "the same" if committed.exists() and committed.read_bytes() == path.read_bytes() else "differs"
        if committed.exists():
            shutil.copyfile(committed, folder / f"committed-{path.name}")
        other = f'<img src="committed-{path.name}">' if committed.exists() else "none committed"
        figures.append(
            f'<tr><td>{path.name}<br>{same}</td><td><img src="figures/{path.name}"></td><td>{other}</td></tr>'
        )
    page = f"""<!doctype html><meta charset=utf-8><title>{folder.name}</title><style>
body {{ font-family: sans-serif; margin: 2em }}
td {{ padding: .3em .8em; vertical-align: top }} img {{ max-width: 36vw }} td:first-child {{ max-width: 18vw }}
</style><h1>{folder.name}</h1><p>{html.escape(versions())}, code {revision()}</p>
<table><tr><th>notebook<th>seconds<th>status<th>error</tr>{"".join(rows)}</table>
<h2>Figures</h2><table><tr><th><th>this run<th>committed</tr>{"".join(figures)}</table>
"""
    (folder / "index.html").write_text(page, encoding="utf-8")


def _summary(ended: Sequence[Done], folder: Path) -> str:
    width = max(len(done.notebook) for done in ended)
    lines = [f"{'notebook':<{width}}  seconds  status"]
    lines += [f"{d.notebook:<{width}}  {d.seconds:>7.0f}  {d.status}  {d.error[:100]}".rstrip() for d in ended]
    return "\n".join([*lines, f"in {folder}: index.html, manifest.json"])


def printed_summary(path: str | Path) -> str:
    """What the cells tagged `summary` of an executed notebook printed."""
    cells = nbformat.read(path, as_version=4).cells  # type: ignore[no-untyped-call]
    outputs = [o for cell in cells if "summary" in cell.metadata.get("tags", []) for o in cell.get("outputs", [])]
    return "\n".join((o.get("text") or o.get("data", {}).get("text/plain", "")).rstrip() for o in outputs)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].endswith(".ipynb"):
        print(printed_summary(sys.argv[1]))
    else:
        sys.exit(main(sys.argv[1:]))
