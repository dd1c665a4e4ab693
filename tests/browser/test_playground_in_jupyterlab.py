"""The playground in a real browser: Chromium, a real JupyterLab, the notebook as it is committed, the real model.

Screenshots and times are left in build/browser. Skipped where there is no Chromium, except in CI.
"""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from lrs_utils import BezierCurve, LayerScaling, Ledger, load_factors, load_lm, score, tasks
from lrs_utils.models.download import cache_folder
from lrs_utils.notebook import parameters_of

ROOT = Path(__file__).parent.parent.parent
KEPT = ROOT / "build" / "browser"
NOTEBOOK = "05_bezier_playground.ipynb"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_NEWS = '{"fetchNews": "false", "checkForUpdates": false}'

# From a move of the mouse to the frame after it, and to the prediction for it.
CLOCKS = """() => {
    window.paints = []; window.predictions = []; let waiting = null;
    const stale = () => document.querySelector(".lrs-prediction")?.getAttribute("opacity") === "0.25";
    document.addEventListener("pointermove", (event) => requestAnimationFrame(() => setTimeout(() => {
        window.paints.push(performance.now() - event.timeStamp);
        if (stale()) waiting ??= event.timeStamp;
    })), true);
    new MutationObserver(() => {
        if (waiting === null || stale()) return;
        window.predictions.push(performance.now() - waiting);
        waiting = null;
    }).observe(document.querySelector(".lrs-playground"), { subtree: true, childList: true });
}"""

pytestmark = pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab over a folder with the notebook at smoke, and a ledger that knows a dozen scalings."""
    home = tmp_path_factory.mktemp("lab")
    notebook = nbformat.read(ROOT / "notebooks" / NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            # 6 contexts, to be seen arriving, of 8 pairs, as the ledger knows them
            values = parameters_of(Path(NOTEBOOK).stem, "smoke") | {"n_contexts": 6, "n_pairs": 8}
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
        cell.get("outputs", []).clear()
    (home / "work").mkdir()
    nbformat.write(notebook, home / "work" / NOTEBOOK)
    (home / "cache").mkdir()
    os.symlink(cache_folder() / "smollm2-135m", home / "cache" / "smollm2-135m")
    chance = np.random.default_rng(0)
    curves = [BezierCurve((0, 10, 20, 29), chance.integers(14, 25, 4) * 0.05) for _ in range(12)]
    scalings = [LayerScaling(curve.factors(30, 0, 0.05, (0.7, 1.2))) for curve in curves]
    with Ledger(home / "cache" / "ledger.sqlite") as ledger:
        score(load_lm(), tasks.kv_retrieval(8, 6, seed=0, keys="short"), scalings, ledger=ledger)
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(NO_NEWS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {"JUPYTERLAB_SETTINGS_DIR": settings.parent.parent, "JUPYTER_CONFIG_DIR": home / "config"}
    folders |= {"JUPYTERLAB_WORKSPACES_DIR": home / "workspaces", "LRS_CACHE": home / "cache"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--IdentityProvider.token=t", f"--ServerApp.root_dir={home / 'work'}"]
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(
            command, env=os.environ | {k: str(v) for k, v in folders.items()}, stdout=log, stderr=log
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token=t", timeout=5).close()
                break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.fail((home / "lab.log").read_text())
        yield f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK}?token=t", home / "work"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def page(lab):
    KEPT.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1150})
        page.set_default_timeout(30_000)
        page.goto(lab[0])
        try:
            page.locator(".jp-Notebook .jp-CodeCell").first.click()
            expect(page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")).to_be_visible()
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
            expect(page.get_by_text("in build/smoke").last).to_be_attached(timeout=180_000)
        finally:
            page.screenshot(path=KEPT / "opened.png")
        page.locator(".lrs-playground").scroll_into_view_if_needed()
        dropdown(page, "preset").select_option("no scaling")
        expect(page.locator(".lrs-handle").nth(3)).to_have_attribute("aria-valuetext", "layer 29, factor 1")
        page.evaluate(CLOCKS)
        yield page
        page.screenshot(path=KEPT / "last.png")
        browser.close()


def factors(page: Page) -> list[float]:
    return bars(page, "factors")


def bars(page: Page, name: str) -> list[float]:
    found = page.locator(f".lrs-{name} .lrs-slider")
    return found.evaluate_all("bars => bars.map(bar => Number(bar.dataset.value))")


def dropdown(page: Page, name: str):
    return page.locator(".widget-dropdown").filter(has=page.get_by_text(name, exact=True)).locator("select")


def curve_of(page: Page) -> BezierCurve:
    texts = page.eval_on_selector_all(".lrs-handle", "all => all.map(one => one.getAttribute('aria-valuetext'))")
    points = [re.fullmatch(r"layer ([\d.]+), factor ([\d.]+)", text).groups() for text in texts]
    return BezierCurve(*np.array(points, float).T)


def centre(page: Page, point: int) -> tuple[float, float]:
    box = page.locator(".lrs-handle").nth(point).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def settled_centre(page: Page, point: int) -> tuple[float, float]:
    """The same once JupyterLab has stopped scrolling: running a cell scrolls to the next one, when it gets to it."""
    before, now = None, centre(page, point)
    while now != before:
        page.wait_for_timeout(300)
        before, now = now, centre(page, point)
    return now


def expect_status(page: Page, text: str) -> None:
    expect(page.locator("p[role=status]")).to_contain_text(text, timeout=120_000)


def note(name: str, milliseconds: float) -> None:
    """Times are kept and printed, never asserted: machines differ."""
    file = KEPT / "times.json"
    times = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(times | {name: round(milliseconds)}, indent=1))
    print(f"{name}: {milliseconds:.0f} ms")


def since(began: float) -> float:
    return 1000 * (time.perf_counter() - began)


class Film:
    """Pictures of the playground, to be seen one after the other."""

    def __init__(self, page: Page) -> None:
        self._page, self._frames = page, []

    def take(self) -> None:
        picture = self._page.locator(".lrs-playground").screenshot()
        self._frames.append(Image.open(io.BytesIO(picture)).convert("P", palette=Image.Palette.ADAPTIVE, colors=64))

    def save(self, path: Path) -> None:
        first, *rest = self._frames
        first.save(path, save_all=True, append_images=rest, duration=[250] * len(rest) + [2500], loop=0, optimize=True)


def test_a_drag_moves_factors_and_prediction_at_once_and_measures_when_let_go(page):
    film = Film(page)
    page.screenshot(path=KEPT / "1-before.png")
    film.take()
    before, (x, y) = factors(page), centre(page, 2)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - 50)
    assert factors(page) != before
    page.wait_for_selector('.lrs-prediction[opacity="1"]')
    for step in range(10):
        page.mouse.move(x - 4 * step, y - 50 + 15 * step)
        film.take()
    assert page.locator(".lrs-current").count() == 0
    page.wait_for_selector('.lrs-prediction[opacity="1"]')
    page.screenshot(path=KEPT / "2-during.png")
    predictions = page.evaluate("window.predictions")
    note("a move to its prediction, median", float(np.median(predictions)))
    note("a move to its prediction, longest", max(predictions))
    shown = curve_of(page)
    assert factors(page) == list(shown.factors(30, 0, 0.05, (0.7, 1.2)))
    page.mouse.up()
    began = time.perf_counter()
    page.wait_for_selector('.lrs-current[opacity="1"]')
    note("letting go to the first measured context, 8 short pairs", since(began))
    while "measured on 6 of 6 contexts" not in page.locator("p[role=status]").inner_text() and since(began) < 60_000:
        film.take()
    expect(page.locator(".lrs-current text")).to_contain_text("6 of 6 contexts")
    page.screenshot(path=KEPT / "3-after.png")
    film.take()
    film.save(KEPT / "drag.gif")
    assert curve_of(page) == shown


def test_arrow_keys_move_the_focused_point(page):
    page.locator(".lrs-handle").nth(1).focus()
    before = curve_of(page)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    after = curve_of(page)
    assert after.values[1] == pytest.approx(before.values[1] - 0.05)
    assert after.layers[1] == before.layers[1] + 1
    slider = page.locator(".widget-slider", has_text="P2 factor").locator(".widget-readout")
    expect(slider).to_have_text(f"{after.values[1]:.2f}")
    expect_status(page, "measured on 6 of 6 contexts")


def test_a_slider_moves_the_curve_and_a_drag_moves_the_slider(page):
    slider = page.locator(".widget-slider", has_text="P1 factor")
    before = curve_of(page)
    slider.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".lrs-handle").nth(0)).not_to_have_attribute("aria-valuenow", f"{before.values[0]:g}")
    moved = curve_of(page).values[0]
    assert float(slider.locator(".widget-readout").inner_text()) == pytest.approx(moved)
    x, y = centre(page, 0)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y + 60, steps=5)
    page.mouse.up()
    dragged = curve_of(page).values[0]
    assert dragged < moved
    expect(slider.locator(".widget-readout")).to_have_text(f"{dragged:.2f}")


def test_undo_and_redo(page):
    first, before = page.locator(".lrs-handle").nth(0), curve_of(page).values[0]
    first.focus()
    page.keyboard.press("ArrowDown" if before > 1 else "ArrowUp")  # something to undo
    expect(first).not_to_have_attribute("aria-valuenow", f"{before:g}")
    expect_status(page, "measured on 6 of 6 contexts")
    now = curve_of(page)
    value = f"{now.values[0]:g}"
    page.get_by_role("button", name="Undo").click()
    expect(first).not_to_have_attribute("aria-valuenow", value)
    page.get_by_role("button", name="Redo").click()
    expect(first).to_have_attribute("aria-valuenow", value)
    assert curve_of(page) == now


def test_saved_factors_are_those_shown(page, lab):
    shown, file = factors(page), lab[1] / "my-factors.json"
    page.get_by_role("button", name="Save factors").click()
    for _ in range(300):  # not the status, which a measurement that ends just then writes over
        if file.exists():
            break
        page.wait_for_timeout(100)
    assert list(load_factors(file).factors) == shown


def test_dragging_stays_smooth_while_the_kernel_is_busy(page):
    page.locator(".jp-Notebook .jp-CodeCell").last.click()
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    page.keyboard.type("import time; time.sleep(12); print('kernel', 'free')")
    page.keyboard.press("Shift+Enter")
    expect(page.locator(".jp-InputPrompt", has_text="[*]").first).to_be_attached()
    page.locator(".lrs-playground").scroll_into_view_if_needed()
    before, (x, y) = factors(page), settled_centre(page, 1)
    page.mouse.move(x, y)
    page.mouse.down()
    for step in range(40):
        page.mouse.move(x, y + 2 * step)
    assert factors(page) != before
    page.mouse.up()
    assert page.get_by_text("kernel free").count() == 0, "the kernel was busy all along"
    paints = page.evaluate("window.paints.slice(-40)")
    note("input to paint while the kernel is busy, median", float(np.median(paints)))
    note("input to paint while the kernel is busy, 95th percentile", float(np.quantile(paints, 0.95)))
    expect(page.get_by_text("kernel free")).to_be_attached(timeout=30_000)
    expect_status(page, "measured on 6 of 6 contexts")


def test_a_shipped_file_is_shown_with_its_temperatures(page):
    found = load_factors("smollm2-135m/layers-general")
    dropdown(page, "load").select_option("smollm2-135m/layers-general")
    expect(page.locator(".lrs-temperatures .lrs-slider")).to_have_count(30)
    assert bars(page, "factors") == list(found.factors)
    assert bars(page, "temperatures") == list(found.temperatures)
    expect_status(page, "measured on 6 of 6 contexts")
    page.screenshot(path=KEPT / "4-file.png")


def test_a_missing_file_is_one_sentence_and_changes_nothing(page):
    before = factors(page)
    page.get_by_role("textbox", name="file").fill("nowhere.json")
    page.get_by_role("button", name="Load factors").click()
    expect_status(page, "nowhere.json is no file; by name there are")
    assert factors(page) == before


def test_a_bar_is_dragged_alone_and_moved_by_arrow_keys(page):
    before = factors(page)
    bar = page.locator(".lrs-factors .lrs-slider").nth(14)
    box = bar.locator(".lrs-grip").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    for step in range(10):
        page.mouse.move(x, y - 2 * step)
    page.screenshot(path=KEPT / "5-bar.png")
    page.mouse.up()
    after = factors(page)
    assert [layer for layer in range(30) if before[layer] != after[layer]] == [14]
    assert after[14] > before[14]
    assert after[14] * 20 == pytest.approx(round(after[14] * 20))
    page.keyboard.press("ArrowDown")
    assert factors(page)[14] == pytest.approx(after[14] - 0.05)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert factors(page)[15] > before[15]
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "factor of layer 15"
    expect_status(page, "measured on 6 of 6 contexts")
    dropdown(page, "preset").select_option("no scaling")
    expect(page.locator(".lrs-slider").nth(14)).to_have_attribute("aria-valuenow", "1")


def test_improve_moves_the_bars_step_by_step_and_stop_ends_it_at_once(page):
    film, before = Film(page), factors(page)
    dropdown(page, "scheme").select_option("ntk")
    expect_status(page, "measured on 6 of 6 contexts")
    page.get_by_role("button", name="Improve").click()
    began = time.perf_counter()
    expect_status(page, "step 1 of 20")
    note("improve to its first step, 8 short pairs", since(began))
    expect(page.locator(".lrs-temperatures .lrs-slider")).to_have_count(30)
    first = factors(page)
    assert first != before
    for step in (2, 3, 4):
        expect_status(page, f"step {step} of 20")
        film.take()
    note("four steps, each measured on two contexts", since(began))
    page.screenshot(path=KEPT / "6-improve.png")
    began = time.perf_counter()
    page.get_by_role("button", name="Stop").click()
    expect_status(page, "stopped")
    note("stop to stopped", since(began))
    film.save(KEPT / "improve.gif")
    reached = factors(page)
    assert reached not in (first, before)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".lrs-factors .lrs-slider").nth(5)).to_have_attribute("aria-valuenow", f"{before[5]:g}")
    assert factors(page) == before
    dropdown(page, "scheme").select_option("pi")


def test_two_files_are_compared_with_an_interval_of_their_difference(page):
    dropdown(page, "compare").select_option("smollm2-135m/layers-general")
    dropdown(page, "with").select_option("smollm2-135m/ga")
    expect(page.locator(".lrs-difference")).to_contain_text("6 contexts", timeout=120_000)
    assert re.fullmatch(
        r"layers-general minus ga: [+-][.\d]+ \[[+-][.\d]+, [+-][.\d]+\], 6 contexts",
        page.locator(".lrs-difference").text_content(),
    )
    expect(page.locator(".lrs-first text")).to_contain_text("smollm2-135m/layers-general, 6 of 6 contexts")
    page.locator(".lrs-playground").screenshot(path=KEPT / "7-compared.png")
    dropdown(page, "with").select_option("")
    expect(page.locator(".lrs-difference")).to_have_count(0)


def test_heads_are_seen_on_maps_chosen_by_click_and_keys_and_changed_by_sliders(page):
    dropdown(page, "load").select_option("smollm2-135m/pairs")
    gains = load_factors("smollm2-135m/pairs").gains
    cell = page.locator('.lrs-head-gains .lrs-cell[data-layer="12"][data-head="3"]')
    expect(cell).to_have_attribute("data-value", f"{gains[12][3]:g}", timeout=120_000)
    expect(page.locator(".lrs-head-gains .lrs-cell")).to_have_count(270)
    cell.click()
    slider = page.get_by_role("slider", name="gain of layer 12, head 3", exact=True)
    before = float(slider.input_value())
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(cell).to_have_attribute("data-value", f"{round(before + 0.05, 2):g}")
    expect(page.get_by_label("as Python")).to_have_value(re.compile("HeadScaling"))
    cell.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    expect(page.locator(".lrs-head strong")).to_have_text("layer 13, head 4")
    expect_status(page, "measured on 6 of 6 contexts")
    page.screenshot(path=KEPT / "8-heads.png")
    page.set_viewport_size({"width": 1000, "height": 1150})  # of which the notebook has about 600
    page.locator(".lrs-playground").screenshot(path=KEPT / "9-narrow.png")
    page.set_viewport_size({"width": 1300, "height": 1150})
    page.get_by_role("checkbox", name="heads").uncheck()
    expect(page.locator(".lrs-cell")).to_have_count(0)
