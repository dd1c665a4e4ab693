// A row of numbers, one a layer, each a bar from 1 that can be dragged.

const KEY_MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }; // layers, steps

/** Let one of several nodes be reached by Tab, and the others from it. */
function focusOne(nodes, index) {
  nodes.forEach((node, at) => node.setAttribute("tabindex", at === index ? 0 : -1));
  nodes[index].focus();
}

class Bars {
  /** `name` is "factors" or "temperatures"; `label` what one of them is called. */
  constructor(el, edited, name, label, height, bottom) {
    Object.assign(this, { edited, name, label, height, bottom, range: null, grabbed: null });
    this.svg = addPanel(el, `${label} of every layer`, height, `lrs-${name}`);
    this.still = addNode(this.svg, "g");
    this.nodes = Array.from({ length: edited.config.layers }, (_, layer) => this.addBar(layer));
  }

  remove() {
    this.svg.remove();
  }

  get values() {
    return this.name === "factors" ? this.edited.factors : this.edited.numbers[this.name];
  }

  /** From the lowest to the highest of the grid and the bars, and a little beyond. */
  findRange() {
    const { low, high } = this.edited.config, values = this.values;
    return [Math.min(low, 1, ...values) * 0.95, Math.max(high, 1, ...values) * 1.05];
  }

  /** New axes where bars have left the old ones, but never during a drag. */
  drawAxes() {
    const { layers, step } = this.edited.config, range = this.findRange();
    if (this.range && (this.edited.isDragged || areEqual(range, this.range))) return;
    this.range = range;
    this.still.replaceChildren();
    const ticks = Array.from({ length: 7 }, (_, i) => Math.round((i * (layers - 1)) / 6));
    [this.x, this.y] = drawAxes(this.still, { range: [-0.7, layers - 0.3], ticks: [...new Set(ticks)], label: "layer" },
      { range, ticks: chooseTicks(...range, step), label: this.label }, TOP, this.bottom, makeLogScale);
    addNode(this.still, "path", { d: `M${LEFT} ${this.y(1)}H${WIDTH - RIGHT}`, class: "lrs-one" });
  }

  draw() {
    this.drawAxes();
    const { x, y } = this, width = x(1) - x(0), { lowest, highest } = this.edited.config;
    this.values.forEach((value, layer) => {
      const g = this.nodes[layer], [bar, grip] = g.children, ends = [y(1), y(value)];
      g.dataset.value = value;
      setAttributes(bar, { x: x(layer) - 0.4 * width, y: Math.min(...ends), width: 0.8 * width,
        height: Math.abs(ends[0] - ends[1]) });
      setAttributes(grip, { x: x(layer) - 0.5 * width, y: TOP, width, height: this.bottom - TOP });
      setAttributes(g, { "aria-valuemin": Math.min(lowest, value), "aria-valuemax": Math.max(highest, value),
        "aria-valuenow": value, "aria-valuetext": `layer ${layer}, ${this.label} ${value}` });
      g.querySelector("title").textContent = `layer ${layer}: ${this.label} ${value}`;
    });
  }

  addBar(layer) {
    const g = addNode(this.svg, "g", { ...OWN_KEYS, role: "slider", tabindex: layer ? -1 : 0, class: "lrs-slider",
      "aria-label": `${this.label} of layer ${layer}`, "aria-orientation": "vertical", "data-layer": layer });
    addNode(g, "rect", { class: "lrs-bar" });
    addNode(g, "rect", { class: "lrs-grip" });
    addNode(g, "title");
    g.addEventListener("pointerdown", (event) => this.grab(event, g, layer));
    g.addEventListener("pointermove", (event) => this.follow(event, layer));
    g.addEventListener("lostpointercapture", () => this.release(layer)); // however a drag ends
    g.addEventListener("keydown", (event) => this.press(event, layer));
    return g;
  }

  /** A bar is dragged from where it is grabbed, its whole column through: it may be too short to be hit. */
  grab(event, g, layer) {
    if (event.button !== 0) return;
    g.setPointerCapture(event.pointerId);
    focusOne(this.nodes, layer);
    this.grabbed = { layer, offset: this.y(this.values[layer]) - locate(this.svg, event).y };
    this.edited.drag(true);
    event.preventDefault();
  }

  follow(event, layer) {
    if (this.grabbed?.layer !== layer) return;
    const at = clamp(locate(this.svg, event).y + this.grabbed.offset, TOP, this.bottom);
    this.edited.setBar(this.name, layer, this.y.back(at));
  }

  release(layer) {
    if (this.grabbed?.layer !== layer) return;
    this.grabbed = null;
    this.edited.drag(false);
  }

  press(event, layer) {
    if (!(event.key in KEY_MOVES)) return;
    event.preventDefault();
    event.stopPropagation();
    const [layers, steps] = KEY_MOVES[event.key];
    if (layers) focusOne(this.nodes, clamp(layer + layers, 0, this.nodes.length - 1));
    else this.edited.setBar(this.name, layer, this.values[layer] + steps * this.edited.config.step);
  }
}
