// The editor and the accuracy by depth, drawn here so that dragging is smooth whatever the kernel does.
// The kernel sends what it knows (`state`); the control points (`points`) go both ways.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 470, HEIGHT = 290, LEFT = 52, RIGHT = 12, TOP = 14, BOTTOM = 40;
const ROW = 14; // height of a line in the legend
const COLOURS = { baseline: "#949494", best: "#029e73", current: "#0173b2", prediction: "#0173b2" };
const DEPTHS = [0, 0.25, 0.5, 0.75, 1];
const KEY_MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }; // layers, steps

const areEqual = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** A value to the nearest multiple of the step within bounds. */
function snapValue(value, { step, low, high }) {
  const steps = clamp(Math.round(value / step), Math.ceil(low / step - 1e-9), Math.floor(high / step + 1e-9));
  return Number((steps * step).toFixed(10));
}

/** Factor of every layer, as BezierCurve.factors gives it but for samples on a rounding edge (lrs_utils/scaling/bezier.py). */
export function sampleFactors(points, config) {
  const x = points.map((point) => point[0]), y = points.map((point) => point[1]);
  const bezier = (c, t) =>
    (1 - t) ** 3 * c[0] + 3 * (1 - t) ** 2 * t * c[1] + 3 * (1 - t) * t ** 2 * c[2] + t ** 3 * c[3];
  return Array.from({ length: config.layers }, (_, layer) => {
    if (layer < config.first) return 1;
    let a = 0, b = 1; // x(t) increases: halve
    for (let i = 0; i < 50; i++) bezier(x, (a + b) / 2) < layer ? (a = (a + b) / 2) : (b = (a + b) / 2);
    const t = layer <= x[0] ? 0 : layer >= x[3] ? 1 : (a + b) / 2;
    return snapValue(bezier(y, t), config);
  });
}

/** Where a control point may be: on the grid, in bounds, between its neighbours (Playground.move). */
function snapPoint(points, index, layer, value, config) {
  const low = index > 0 ? points[index - 1][0] + 1 : config.first;
  const high = index < 3 ? points[index + 1][0] - 1 : config.layers - 1;
  return [clamp(Math.round(layer), low, high), snapValue(value, config)];
}

function setAttributes(node, attributes) {
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
}

function addNode(parent, name, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, name);
  setAttributes(node, attributes);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

function addPanel(el, label) {
  return addNode(el, "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "lrs-panel", role: "group", "aria-label": label });
}

/** Pixels from numbers, and by `back` numbers from pixels. */
function makeScale(low, high, from, to) {
  const scale = (value) => from + ((value - low) / (high - low)) * (to - from);
  scale.back = (pixel) => low + ((pixel - from) / (to - from)) * (high - low);
  return scale;
}

/** Axes, each { range, ticks, label }; returns their scales. */
function drawAxes(svg, horizontal, vertical, top = TOP) {
  const x = makeScale(...horizontal.range, LEFT, WIDTH - RIGHT);
  const y = makeScale(...vertical.range, HEIGHT - BOTTOM, top);
  const g = addNode(svg, "g", { class: "lrs-axes", "aria-hidden": "true" });
  addNode(g, "path", { d: `M${LEFT} ${top}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}` });
  for (const tick of horizontal.ticks)
    addNode(g, "text", { x: x(tick), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, tick);
  for (const tick of vertical.ticks) addNode(g, "text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, tick);
  addNode(g, "text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 8, "text-anchor": "middle" }, horizontal.label);
  const middle = (top + HEIGHT - BOTTOM) / 2;
  addNode(g, "text", { transform: `translate(13 ${middle}) rotate(-90)`, "text-anchor": "middle" }, vertical.label);
  return [x, y];
}

/** The curve with its control points, and the factors that come of it. */
class Editor {
  constructor(el, model, onDraw) {
    this.model = model;
    this.onDraw = onDraw; // whatever else depends on where the points are
    this.config = model.get("config");
    this.points = model.get("points");
    this.draggedPoint = null;
    this.sendQueued = false;
    this.svg = addPanel(el, "layer factors");
    this.drawStill();
    this.handles = this.points.map((_, index) => this.addHandle(index));
    model.on("change:points", () => this.receivePoints());
    if (model.get("dragging")) this.setDragging(false); // the page was left in the middle of a drag
  }

  /** What does not move: axes and the line of factor 1; and nodes for what does. */
  drawStill() {
    const { layers, low, high, step } = this.config, ticks = [];
    for (let value = low; value <= high + 1e-9; value += 2 * step) ticks.push(Number(value.toFixed(2)));
    const layerTicks = Array.from({ length: 7 }, (_, i) => Math.round((i * (layers - 1)) / 6));
    [this.x, this.y] = drawAxes(this.svg, { range: [-0.7, layers - 0.3], ticks: layerTicks, label: "layer" },
      { range: [low - 2 * step, high + 2 * step], ticks, label: "factor" });
    const bars = addNode(this.svg, "g", { class: "lrs-bars", "aria-hidden": "true" });
    this.bars = Array.from({ length: layers }, () => addNode(bars, "rect"));
    addNode(this.svg, "path", { d: `M${LEFT} ${this.y(1)}H${WIDTH - RIGHT}`, class: "lrs-one" });
    this.polygon = addNode(this.svg, "path", { class: "lrs-polygon" });
    this.curve = addNode(this.svg, "path", { class: "lrs-curve" });
  }

  /** The kernel's own factors once it has them: where a sample lies on a rounding edge the last digit decides. */
  getFactors() {
    const state = this.model.get("state");
    return areEqual(state.points, this.points) ? state.factors : sampleFactors(this.points, this.config);
  }

  draw() {
    const { x, y, points, config } = this, width = x(1) - x(0);
    this.getFactors().forEach((factor, layer) => {
      const top = y(Math.max(factor, 1)), height = Math.abs(y(1) - y(factor));
      this.bars[layer].dataset.factor = factor;
      setAttributes(this.bars[layer], { x: x(layer) - 0.4 * width, y: top, width: 0.8 * width, height });
    });
    const at = points.map(([layer, value]) => `${x(layer)} ${y(value)}`);
    this.polygon.setAttribute("d", `M${at.join("L")}`);
    this.curve.setAttribute("d", `M${x(config.first)} ${y(points[0][1])}L${at[0]}C${at[1]} ${at[2]} ${at[3]}`
      + `L${x(config.layers - 1)} ${y(points[3][1])}`);
    this.handles.forEach((handle, index) => {
      const [layer, value] = points[index], spoken = `layer ${layer}, factor ${value}`;
      setAttributes(handle, { cx: x(layer), cy: y(value), "aria-valuenow": value, "aria-valuetext": spoken });
    });
    this.onDraw();
  }

  move(index, layer, value) {
    const moved = this.points.slice();
    moved[index] = snapPoint(this.points, index, layer, value, this.config);
    if (areEqual(moved, this.points)) return;
    this.points = moved;
    this.draw();
    this.sendPoints();
  }

  sendPoints() {
    if (this.sendQueued) return;
    this.sendQueued = true; // at most once a frame
    requestAnimationFrame(() => {
      this.sendQueued = false;
      this.model.set("points", this.points);
      this.model.save_changes();
    });
  }

  receivePoints() {
    if (this.draggedPoint !== null || areEqual(this.points, this.model.get("points"))) return;
    this.points = this.model.get("points");
    this.draw();
  }

  setDragging(dragging) {
    this.model.set("points", this.points);
    this.model.set("dragging", dragging);
    this.model.save_changes();
  }

  addHandle(index) {
    const handle = addNode(this.svg, "circle", { r: 9, tabindex: 0, role: "slider", class: "lrs-handle",
      "aria-label": `control point ${index + 1} of 4`, "aria-valuemin": this.config.low, "aria-valuemax": this.config.high,
      "data-point": index });
    handle.addEventListener("pointerdown", (event) => this.grab(event, handle, index));
    handle.addEventListener("pointermove", (event) => this.followPointer(event, index));
    handle.addEventListener("lostpointercapture", () => this.release(index)); // however a drag ends
    handle.addEventListener("keydown", (event) => this.followKey(event, index));
    return handle;
  }

  grab(event, handle, index) {
    if (event.button !== 0) return;
    handle.setPointerCapture(event.pointerId);
    handle.focus();
    this.draggedPoint = index;
    this.setDragging(true);
    event.preventDefault();
  }

  followPointer(event, index) {
    if (this.draggedPoint !== index) return;
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(this.svg.getScreenCTM().inverse());
    this.move(index, this.x.back(at.x), this.y.back(at.y));
  }

  release(index) {
    if (this.draggedPoint !== index) return;
    this.draggedPoint = null;
    this.setDragging(false);
  }

  followKey(event, index) {
    if (!(event.key in KEY_MOVES)) return;
    event.preventDefault();
    event.stopPropagation();
    const [layer, value] = this.points[index], [layers, steps] = KEY_MOVES[event.key];
    this.move(index, layer + layers, value + steps * this.config.step);
  }
}

/** Accuracy by depth of what is measured and predicted. */
class Chart {
  constructor(el, model) {
    this.model = model;
    this.svg = addPanel(el, "accuracy by depth");
    this.drawn = null;
  }

  /** Draw what the kernel sent last; pale where it is of other points than those shown. */
  draw(pointsShown) {
    const { curves, points } = this.model.get("state");
    this.drawn?.remove();
    this.drawn = addNode(this.svg, "g");
    const highest = Math.max(0.2, ...curves.flatMap((curve) => curve.high ?? curve.mean));
    const limit = Math.min(1, Math.ceil(highest * 10) / 10);
    const ticks = DEPTHS.map((part) => Number((part * limit).toFixed(3)));
    const [x, y] = drawAxes(this.drawn, { range: [-0.02, 1.02], ticks: DEPTHS, label: "depth of the answer (0 beginning, 1 end)" },
      { range: [0, limit], ticks, label: "exact answers" }, TOP + 4 * ROW); // the legend is above
    const isOutdated = !areEqual(points, pointsShown);
    curves.forEach((curve, row) => this.drawCurve(curve, row, isOutdated, x, y));
  }

  drawCurve({ name, kind, depths, mean, low, high }, row, isOutdated, x, y) {
    const opacity = isOutdated && (kind === "current" || kind === "prediction") ? 0.25 : 1;
    const g = addNode(this.drawn, "g", { class: `lrs-result lrs-${kind}`, "data-kind": kind, opacity });
    const place = (values) => values.map((value, i) => `${x(depths[i])} ${y(value)}`);
    const band = low && `M${place(low).join("L")}L${place(high).reverse().join("L")}Z`;
    if (band) addNode(g, "path", { d: band, fill: COLOURS[kind], opacity: 0.18 });
    const stroke = { stroke: COLOURS[kind], "stroke-dasharray": kind === "prediction" ? "5 4" : "none" };
    const width = kind === "current" ? 2.2 : 1.4;
    addNode(g, "path", { d: `M${place(mean).join("L")}`, fill: "none", "stroke-width": width, ...stroke });
    addNode(g, "text", { x: LEFT + 30, y: TOP + 2 + ROW * row }, name);
    addNode(g, "path", { d: `M${LEFT + 4} ${TOP - 2 + ROW * row}h20`, "stroke-width": 2, ...stroke });
  }
}

function addCopyButton(el, model, editor) {
  const button = document.createElement("button");
  button.className = "jupyter-button lrs-copy";
  button.textContent = "Copy as Python";
  button.addEventListener("click", async () => {
    const text = `LayerScaling(${JSON.stringify(editor.getFactors())}, scheme="${model.get("state").scheme}")`;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "No clipboard here: copy it from below";
    }
    setTimeout(() => (button.textContent = "Copy as Python"), 2500);
  });
  el.append(button);
}

function addStatus(el, model) {
  const status = document.createElement("p"); // stays, so that its changes are read out
  status.setAttribute("role", "status");
  el.append(status);
  const update = () => (status.textContent = model.get("state").status ?? "");
  model.on("change:state", update);
  update();
}

function render({ model, el }) {
  el.classList.add("lrs-playground");
  el.dataset.lmSuppressShortcuts = "true"; // JupyterLab would take the arrow keys
  const editor = new Editor(el, model, () => chart.draw(editor.points));
  const chart = new Chart(el, model);
  addCopyButton(el, model, editor);
  model.on("change:state", () => editor.draw());
  addStatus(el, model);
  editor.draw();
}

export default { render };
