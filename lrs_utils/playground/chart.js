// Accuracy by depth of what is measured and predicted, and the difference of two scalings.

const ROW = 14; // height of a line in the legend
const DEPTHS = [0, 0.25, 0.5, 0.75, 1];
const DASHES = { prediction: "5 4", second: "9 3" };
const DEPTH_AXIS = { range: [-0.02, 1.02], ticks: DEPTHS, label: "depth of the answer (0 beginning, 1 end)" };

/** A line with its band. */
function drawLine(g, { depths, mean, low, high, colour }, x, y, attributes) {
  const place = (values) => values.map((value, i) => `${x(depths[i])} ${y(value)}`);
  if (low) addNode(g, "path", { d: `M${place(low).join("L")}L${place(high).reverse().join("L")}Z`, fill: colour, opacity: 0.18 });
  addNode(g, "path", { d: `M${place(mean).join("L")}`, fill: "none", stroke: colour, ...attributes });
}

class Chart {
  constructor(el, edited) {
    this.edited = edited;
    this.svg = addPanel(el, "accuracy by depth", 290);
    this.drawn = null;
  }

  /** Draw what the kernel sent last; pale where it is of other numbers than those shown. */
  draw() {
    const { curves } = this.edited.model.get("state"), isAhead = this.edited.isAhead;
    this.drawn?.remove();
    this.drawn = addNode(this.svg, "g");
    const highest = Math.max(0.2, ...curves.flatMap((curve) => curve.high ?? curve.mean));
    const limit = Math.min(1, Math.ceil(highest * 10) / 10);
    const ticks = DEPTHS.map((part) => Number((part * limit).toFixed(3)));
    const vertical = { range: [0, limit], ticks, label: "exact answers" };
    const [x, y] = drawAxes(this.drawn, DEPTH_AXIS, vertical, TOP + ROW * Math.max(4, curves.length), 250); // below the legend
    curves.forEach((curve, row) => this.drawCurve(curve, row, isAhead, x, y));
  }

  drawCurve(curve, row, isAhead, x, y) {
    const { kind, name, colour } = curve;
    const opacity = isAhead && (kind === "current" || kind === "prediction") ? 0.25 : 1;
    const g = addNode(this.drawn, "g", { class: `lrs-result lrs-${kind}`, "data-kind": kind, opacity });
    const dashes = { "stroke-dasharray": DASHES[kind] ?? "none" };
    drawLine(g, curve, x, y, { "stroke-width": kind === "current" ? 2.2 : 1.4, ...dashes });
    addNode(g, "text", { x: LEFT + 30, y: TOP + 2 + ROW * row }, name);
    addNode(g, "path", { d: `M${LEFT + 4} ${TOP - 2 + ROW * row}h20`, "stroke-width": 2, stroke: colour, ...dashes });
  }
}

/** The difference of two scalings by depth, with its band; the line above says it over all depths. */
class DifferenceChart {
  constructor(el, edited) {
    this.edited = edited;
    this.svg = addPanel(el, "difference by depth", 170);
  }

  remove() {
    this.svg.remove();
  }

  draw() {
    const { difference } = this.edited.model.get("state");
    this.svg.replaceChildren();
    const limit = Math.max(0.1, ...[...difference.low, ...difference.high].map(Math.abs));
    const ticks = [-limit, 0, limit].map((tick) => Number(tick.toFixed(2)));
    const [x, y] = drawAxes(this.svg, DEPTH_AXIS, { range: [-limit, limit], ticks, label: "difference" }, TOP + ROW, 130);
    addNode(this.svg, "path", { d: `M${LEFT} ${y(0)}H${WIDTH - RIGHT}`, class: "lrs-one" });
    drawLine(this.svg, difference, x, y, { "stroke-width": 2 });
    addNode(this.svg, "text", { x: LEFT + 4, y: TOP + 2, class: "lrs-difference" }, difference.name);
  }
}
