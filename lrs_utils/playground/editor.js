// The curve with its control points, over the bars of the factors.

const CURVE_PIECES = 60; // straight ones, since the axis of factors is logarithmic

class CurveEditor {
  constructor(el, edited) {
    this.edited = edited;
    this.bars = new Bars(el, edited, "factors", "factor", 290, 250);
    this.g = addNode(this.bars.svg, "g");
    this.polygon = addNode(this.g, "path", { class: "lrs-polygon" });
    this.curve = addNode(this.g, "path", { class: "lrs-curve" });
    this.handles = edited.numbers.points.map((_, index) => this.addHandle(index));
    this.draggedPoint = null;
  }

  draw() {
    this.bars.draw();
    const { points, factors } = this.edited.numbers, { first, layers } = this.edited.config, { x, y } = this.bars;
    this.g.setAttribute("class", factors === null ? "" : "lrs-away"); // bars that were set one by one
    const at = points.map(([layer, value]) => `${x(layer)} ${y(value)}`);
    this.polygon.setAttribute("d", `M${at.join("L")}`);
    const coordinate = (axis, piece) => bezier(points.map((point) => point[axis]), piece / CURVE_PIECES);
    const along = Array.from({ length: CURVE_PIECES + 1 }, (_, i) => `${x(coordinate(0, i))} ${y(coordinate(1, i))}`);
    this.curve.setAttribute("d", `M${x(first)} ${y(points[0][1])}L${along.join("L")}L${x(layers - 1)} ${y(points[3][1])}`);
    this.handles.forEach((handle, index) => {
      const [layer, value] = points[index], spoken = `layer ${layer}, factor ${value}`;
      setAttributes(handle, { cx: x(layer), cy: y(value), "aria-valuenow": value, "aria-valuetext": spoken });
    });
  }

  addHandle(index) {
    const { low, high } = this.edited.config;
    const handle = addNode(this.g, "circle", { ...OWN_KEYS, r: 9, tabindex: 0, role: "slider", class: "lrs-handle",
      "aria-label": `control point ${index + 1} of 4`, "aria-valuemin": low, "aria-valuemax": high, "data-point": index });
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
    this.edited.drag(true);
    event.preventDefault();
  }

  followPointer(event, index) {
    if (this.draggedPoint !== index) return;
    const at = locate(this.bars.svg, event);
    this.edited.movePoint(index, this.bars.x.back(at.x), this.bars.y.back(at.y));
  }

  release(index) {
    if (this.draggedPoint !== index) return;
    this.draggedPoint = null;
    this.edited.drag(false);
  }

  followKey(event, index) {
    if (!(event.key in KEY_MOVES)) return;
    event.preventDefault();
    event.stopPropagation();
    const [layer, value] = this.edited.numbers.points[index], [layers, steps] = KEY_MOVES[event.key];
    this.edited.movePoint(index, layer + layers, value + steps * this.edited.config.step);
  }
}
