// The editor and the accuracy curves of the playground, drawn here so that dragging is smooth whatever the kernel does.
// The kernel sends what it knows (`state`); the control points (`points`) go both ways.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 470, HEIGHT = 290, LEFT = 52, RIGHT = 12, TOP = 14, BOTTOM = 40;
const COLOURS = { baseline: "#949494", best: "#029e73", current: "#0173b2", prediction: "#0173b2" };

/** Factor of every layer, as BezierCurve.factors gives it but for samples on a rounding edge (lrs_utils/scaling/bezier.py). */
export function factors(points, { layers, first, step, low, high }) {
  const x = points.map((p) => p[0]), y = points.map((p) => p[1]);
  const bezier = (c, t) =>
    (1 - t) ** 3 * c[0] + 3 * (1 - t) ** 2 * t * c[1] + 3 * (1 - t) * t ** 2 * c[2] + t ** 3 * c[3];
  const lowest = Math.ceil(low / step - 1e-9), highest = Math.floor(high / step + 1e-9);
  return Array.from({ length: layers }, (_, layer) => {
    if (layer < first) return 1;
    let a = 0, b = 1; // x(t) increases: halve
    for (let i = 0; i < 50; i++) bezier(x, (a + b) / 2) < layer ? (a = (a + b) / 2) : (b = (a + b) / 2);
    const t = layer <= x[0] ? 0 : layer >= x[3] ? 1 : (a + b) / 2;
    const steps = Math.round(bezier(y, t) / step);
    return Number((Math.min(Math.max(steps, lowest), highest) * step).toFixed(10));
  });
}

/** Where a control point may be: on the grid, in bounds, between its neighbours (Playground.move). */
export function snapped(points, index, layer, value, { layers, first, step, low, high }) {
  const least = index > 0 ? points[index - 1][0] + 1 : first;
  const most = index < 3 ? points[index + 1][0] - 1 : layers - 1;
  const steps = Math.min(Math.max(Math.round(value / step), Math.ceil(low / step - 1e-9)), Math.floor(high / step + 1e-9));
  return [Math.min(Math.max(Math.round(layer), least), most), Number((steps * step).toFixed(10))];
}

function make(name, attributes = {}, parent = null, text = null) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function panel(el, label) {
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "lrs-panel", role: "group", "aria-label": label });
  el.append(svg);
  return svg;
}

/** Axes with ticks; returns the two scales, each with its inverse. */
function axes(svg, [x0, x1], [y0, y1], xTicks, yTicks, xLabel, yLabel, above = TOP) {
  const scale = (a, b, from, to) => {
    const f = (v) => from + ((v - a) / (b - a)) * (to - from);
    f.back = (pixel) => a + ((pixel - from) / (to - from)) * (b - a);
    return f;
  };
  const x = scale(x0, x1, LEFT, WIDTH - RIGHT), y = scale(y0, y1, HEIGHT - BOTTOM, above);
  const g = make("g", { class: "lrs-axes", "aria-hidden": "true" }, svg);
  make("path", { d: `M${LEFT} ${above}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}` }, g);
  for (const tick of xTicks) make("text", { x: x(tick), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, g, tick);
  for (const tick of yTicks) make("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, g, tick);
  make("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 8, "text-anchor": "middle" }, g, xLabel);
  const middle = (above + HEIGHT - BOTTOM) / 2;
  make("text", { transform: `translate(13 ${middle}) rotate(-90)`, "text-anchor": "middle" }, g, yLabel);
  return [x, y];
}

function render({ model, el }) {
  const config = model.get("config");
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
  el.classList.add("lrs-playground");
  el.dataset.lmSuppressShortcuts = "true"; // JupyterLab would take the arrow keys
  const editor = panel(el, "layer factors"), curves = panel(el, "accuracy by depth");
  let points = model.get("points"), dragged = null, queued = false;

  // the editor
  const pad = 2 * config.step, ticks = [];
  for (let v = config.low; v <= config.high + 1e-9; v += 2 * config.step) ticks.push(Number(v.toFixed(2)));
  const layerTicks = Array.from({ length: 7 }, (_, i) => Math.round((i * (config.layers - 1)) / 6));
  const [x, y] = axes(editor, [-0.7, config.layers - 0.3], [config.low - pad, config.high + pad], layerTicks, ticks,
    "layer", "factor");
  const bars = make("g", { class: "lrs-bars", "aria-hidden": "true" }, editor);
  const bar = Array.from({ length: config.layers }, () => make("rect", {}, bars));
  make("path", { d: `M${LEFT} ${y(1)}H${WIDTH - RIGHT}`, class: "lrs-one" }, editor);
  const polygon = make("path", { class: "lrs-polygon" }, editor), curve = make("path", { class: "lrs-curve" }, editor);
  const handles = points.map((_, i) =>
    make("circle", { r: 9, tabindex: 0, role: "slider", class: "lrs-handle", "aria-label": `control point ${i + 1} of 4`,
      "aria-valuemin": config.low, "aria-valuemax": config.high, "data-point": i }, editor));

  /** The kernel's own factors once it has them: where a sample lies on a rounding edge the last digit decides. */
  function current() {
    const state = model.get("state");
    return same(state.points, points) ? state.factors : factors(points, config);
  }

  function draw() {
    const width = x(1) - x(0);
    current().forEach((factor, layer) => {
      const top = y(Math.max(factor, 1)), height = Math.abs(y(1) - y(factor));
      bar[layer].dataset.factor = factor;
      for (const [k, v] of Object.entries({ x: x(layer) - 0.4 * width, y: top, width: 0.8 * width, height }))
        bar[layer].setAttribute(k, v);
    });
    const at = points.map(([layer, value]) => `${x(layer)} ${y(value)}`);
    polygon.setAttribute("d", `M${at.join("L")}`);
    curve.setAttribute("d", `M${x(config.first)} ${y(points[0][1])}L${at[0]}C${at[1]} ${at[2]} ${at[3]}`
      + `L${x(config.layers - 1)} ${y(points[3][1])}`);
    handles.forEach((handle, i) => {
      const [layer, value] = points[i];
      handle.setAttribute("cx", x(layer));
      handle.setAttribute("cy", y(value));
      handle.setAttribute("aria-valuenow", value);
      handle.setAttribute("aria-valuetext", `layer ${layer}, factor ${value}`);
    });
    drawCurves();
  }

  function send() {
    if (queued) return;
    queued = true; // at most once a frame
    requestAnimationFrame(() => {
      queued = false;
      model.set("points", points);
      model.save_changes();
    });
  }

  function move(index, layer, value) {
    const next = points.slice();
    next[index] = snapped(points, index, layer, value, config);
    if (same(next, points)) return;
    points = next;
    draw();
    send();
  }

  function drag(begins) {
    model.set("points", points);
    model.set("dragging", begins);
    model.save_changes();
  }

  handles.forEach((handle, i) => {
    handle.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      handle.setPointerCapture(event.pointerId);
      handle.focus();
      dragged = i;
      drag(true);
      event.preventDefault();
    });
    handle.addEventListener("pointermove", (event) => {
      if (dragged !== i) return;
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(editor.getScreenCTM().inverse());
      move(i, x.back(at.x), y.back(at.y));
    });
    handle.addEventListener("lostpointercapture", () => { // however it ends
      if (dragged !== i) return;
      dragged = null;
      drag(false);
    });
    handle.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, config.step], ArrowDown: [0, -config.step] };
      if (!(event.key in step)) return;
      event.preventDefault();
      event.stopPropagation();
      move(i, points[i][0] + step[event.key][0], points[i][1] + step[event.key][1]);
    });
  });

  // the curves
  const top = () => Math.max(0.2, ...model.get("state").curves.flatMap((c) => c.high ?? c.mean));
  let results = null;

  function drawCurves() {
    const { curves: known, points: of } = model.get("state");
    results?.remove();
    results = make("g", {}, curves);
    const high = Math.min(1, Math.ceil(top() * 10) / 10), ticks = [0, 0.25, 0.5, 0.75, 1].map((v) => Number((v * high).toFixed(3)));
    const [u, v] = axes(results, [-0.02, 1.02], [0, high], [0, 0.25, 0.5, 0.75, 1], ticks,
      "depth of the answer (0 begin, 1 end)", "exact answers", TOP + 14 * 4); // names above
    known.forEach(({ name, kind, depths, mean, low, high: most }, row) => {
      const late = (kind === "current" || kind === "prediction") && !same(of, points); // of the curve before this move
      const g = make("g", { class: `lrs-result lrs-${kind}`, "data-kind": kind, opacity: late ? 0.25 : 1 }, results);
      const line = (values) => values.map((value, i) => `${u(depths[i])} ${v(value)}`);
      if (low) make("path", { d: `M${line(low).join("L")}L${line(most).reverse().join("L")}Z`, fill: COLOURS[kind], opacity: 0.18 }, g);
      make("path", { d: `M${line(mean).join("L")}`, stroke: COLOURS[kind], fill: "none", "stroke-width": kind === "current" ? 2.2 : 1.4,
        "stroke-dasharray": kind === "prediction" ? "5 4" : "none" }, g);
      make("text", { x: LEFT + 30, y: TOP + 2 + 14 * row }, g, name);
      make("path", { d: `M${LEFT + 4} ${TOP - 2 + 14 * row}h20`, stroke: COLOURS[kind], "stroke-width": 2,
        "stroke-dasharray": kind === "prediction" ? "5 4" : "none" }, g);
    });
  }

  model.on("change:points", () => {
    if (dragged !== null || same(points, model.get("points"))) return;
    points = model.get("points");
    draw();
  });
  model.on("change:state", draw);

  const copy = document.createElement("button");
  copy.className = "jupyter-button lrs-copy";
  copy.textContent = "Copy as Python";
  copy.addEventListener("click", async () => {
    const text = `LayerScaling(${JSON.stringify(current())}, scheme="${model.get("state").scheme}")`;
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "No clipboard here: copy it from below";
    }
    setTimeout(() => (copy.textContent = "Copy as Python"), 2500);
  });
  el.append(copy);
  const status = document.createElement("p"); // stays, so that its changes are read out
  status.setAttribute("role", "status");
  el.append(status);
  const say = () => (status.textContent = model.get("state").status ?? "");
  model.on("change:state", say);
  if (model.get("dragging")) drag(false); // the page was left in the middle of a drag
  say();
  draw();
}

export default { render };
