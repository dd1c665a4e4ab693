// The browser's side of the playground, in files that are put together in this order (editor.py): what is edited, on
// which grid, and how it goes to the kernel and comes back. All is drawn here, so that dragging is smooth whatever the
// kernel does. The kernel sends what it knows (`state`); what is edited (`numbers`) goes both ways.

const areEqual = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** A value to the nearest multiple of the step within bounds. */
function snapValue(value, step, low, high) {
  const steps = clamp(Math.round(value / step), Math.ceil(low / step - 1e-9), Math.floor(high / step + 1e-9));
  return Number((steps * step).toFixed(10));
}

/** A cubic Bezier curve's coordinate at t. */
const bezier = (c, t) =>
  (1 - t) ** 3 * c[0] + 3 * (1 - t) ** 2 * t * c[1] + 3 * (1 - t) * t ** 2 * c[2] + t ** 3 * c[3];

/** Factor of every layer, as BezierCurve.factors gives it but for samples on a rounding edge (lrs_utils/scaling/bezier.py). */
export function sampleFactors(points, config) {
  const x = points.map((point) => point[0]), y = points.map((point) => point[1]);
  return Array.from({ length: config.layers }, (_, layer) => {
    if (layer < config.first) return 1;
    let a = 0, b = 1; // x(t) increases: halve
    for (let i = 0; i < 50; i++) bezier(x, (a + b) / 2) < layer ? (a = (a + b) / 2) : (b = (a + b) / 2);
    const t = layer <= x[0] ? 0 : layer >= x[3] ? 1 : (a + b) / 2;
    return snapValue(bezier(y, t), config.step, config.low, config.high);
  });
}

/** Where a control point may be: on the grid, in bounds, between its neighbours (Grid.move). */
function snapPoint(points, index, layer, value, { first, layers, step, low, high }) {
  const left = index > 0 ? points[index - 1][0] + 1 : first;
  const right = index < 3 ? points[index + 1][0] - 1 : layers - 1;
  return [clamp(Math.round(layer), left, right), snapValue(value, step, low, high)];
}

/** What is edited: sent at most once a frame, and taken over from the kernel while nothing is dragged. */
class Edited {
  constructor(model, onChange) {
    this.model = model;
    this.onChange = onChange;
    this.config = model.get("config");
    this.numbers = model.get("numbers");
    this.isDragged = false;
    this.isQueued = false;
    model.on("change:numbers", () => this.receive());
    if (!model.get("dragging")) return;
    model.set("dragging", false); // the page was left in the middle of a drag
    this.send();
  }

  /** Whether what the kernel sent last is of other numbers. */
  get isAhead() {
    return !areEqual(this.model.get("state").numbers, this.numbers);
  }

  /** The kernel's own factors once it has them: where a sample lies on a rounding edge the last digit decides. */
  get factors() {
    const { points, factors } = this.numbers;
    return factors ?? (this.isAhead ? sampleFactors(points, this.config) : this.model.get("state").factors);
  }

  change(changes) {
    const changed = { ...this.numbers, ...changes };
    if (areEqual(changed, this.numbers)) return;
    this.numbers = changed;
    this.onChange();
    if (this.isQueued) return;
    this.isQueued = true;
    requestAnimationFrame(() => {
      this.isQueued = false;
      this.send();
    });
  }

  movePoint(index, layer, value) {
    const points = this.numbers.points.slice();
    points[index] = snapPoint(points, index, layer, value, this.config);
    if (!areEqual(points, this.numbers.points)) this.change({ points, factors: null }); // the curve's again
  }

  /** Set one of the factors or temperatures. */
  setBar(name, layer, value) {
    const { step, lowest, highest } = this.config;
    const row = (name === "factors" ? this.factors : this.numbers[name]).slice();
    row[layer] = snapValue(value, step, lowest, highest);
    this.change({ [name]: row });
  }

  /** Set a number of one head. */
  setHead(name, layer, head, value) {
    const { step, lowest, highest } = this.config;
    const rows = this.numbers[name].map((row) => row.slice());
    rows[layer][head] = snapValue(value, step, lowest, highest);
    this.change({ [name]: rows });
  }

  drag(isDragged) {
    this.isDragged = isDragged;
    this.model.set("dragging", isDragged);
    this.send();
    if (!isDragged) this.onChange(); // what held still in the meantime
  }

  send() {
    this.model.set("numbers", this.numbers);
    this.model.save_changes();
  }

  receive() {
    if (this.isDragged || areEqual(this.numbers, this.model.get("numbers"))) return;
    this.numbers = this.model.get("numbers");
    this.onChange();
  }
}
