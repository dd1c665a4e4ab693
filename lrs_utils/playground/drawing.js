// Panels, scales and axes.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 470, LEFT = 52, RIGHT = 12, TOP = 14, BOTTOM = 40;

const OWN_KEYS = { "data-lm-suppress-shortcuts": "true" }; // of what takes the focus: JupyterLab would take its arrow keys

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

function addDiv(parent, className) {
  const div = document.createElement("div");
  div.className = className;
  parent.append(div);
  return div;
}

function addPanel(el, label, height, name = "") {
  const attributes = { viewBox: `0 0 ${WIDTH} ${height}`, class: `lrs-panel ${name}`, role: "group", "aria-label": label };
  return addNode(el, "svg", attributes);
}

/** Where in a panel a pointer is. */
function locate(svg, event) {
  return new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
}

/** Pixels from numbers, and by `back` numbers from pixels. */
function makeScale(low, high, from, to) {
  const scale = (value) => from + ((value - low) / (high - low)) * (to - from);
  scale.back = (pixel) => low + ((pixel - from) / (to - from)) * (high - low);
  return scale;
}

/** The same for what multiplies: half as much is as far from 1 as twice as much. */
function makeLogScale(low, high, from, to) {
  const scale = makeScale(Math.log(low), Math.log(high), from, to);
  const logScale = (value) => scale(Math.log(value));
  logScale.back = (pixel) => Math.exp(scale.back(pixel));
  return logScale;
}

/** Axes, each { range, ticks, label }, in a panel's part from `top` to `bottom`; returns their scales. */
function drawAxes(svg, horizontal, vertical, top, bottom, makeVertical = makeScale) {
  const x = makeScale(...horizontal.range, LEFT, WIDTH - RIGHT), y = makeVertical(...vertical.range, bottom, top);
  const g = addNode(svg, "g", { class: "lrs-axes", "aria-hidden": "true" });
  addNode(g, "path", { d: `M${LEFT} ${top}V${bottom}H${WIDTH - RIGHT}` });
  for (const tick of horizontal.ticks) addNode(g, "text", { x: x(tick), y: bottom + 15, "text-anchor": "middle" }, tick);
  for (const tick of vertical.ticks) addNode(g, "text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, tick);
  addNode(g, "text", { x: (LEFT + WIDTH) / 2, y: bottom + 32, "text-anchor": "middle" }, horizontal.label);
  addNode(g, "text", { transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, vertical.label);
  return [x, y];
}

/** At most seven round numbers in a range that multiplies: even steps where it is narrow, doublings where it is wide. */
function chooseTicks(low, high, step) {
  if (high / low > 3) return [0.1, 0.2, 0.5, 1, 2, 5, 10, 20].filter((tick) => tick >= low && tick <= high);
  let gap = 2 * step;
  while ((high - low) / gap > 7) gap *= 2;
  const first = Math.ceil((low - 1) / gap - 1e-9), n = Math.floor((high - 1) / gap + 1e-9) - first + 1;
  return Array.from({ length: n }, (_, i) => Number((1 + (first + i) * gap).toFixed(2)));
}
