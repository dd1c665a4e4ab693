// Numbers of heads on two maps, layer by head, and sliders for the head that is chosen.

const HEAD_NUMBERS = { head_gains: "gain", head_temperatures: "temperature" };
const CELL_MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }; // layers, heads
const HIGHEST_OF_SLIDER = 3;
const ABOVE = "#de8f05", BELOW = "#0173b2";

/** One kind of numbers; a cell that is chosen is chosen on both maps. */
class HeadMap {
  constructor(el, edited, name, choose) {
    Object.assign(this, { edited, name, choose, label: HEAD_NUMBERS[name], drawn: null });
    const { layers, heads } = edited.config, bottom = TOP + clamp(12 * heads, 90, 320);
    this.svg = addPanel(el, `${this.label} of every head`, bottom + BOTTOM, `lrs-${name.replace("_", "-")}`);
    const ticks = (n, most) => [...new Set(Array.from({ length: most }, (_, i) => Math.round((i * (n - 1)) / (most - 1))))];
    const [x, y] = drawAxes(this.svg, { range: [-0.7, layers - 0.3], ticks: ticks(layers, 7), label: "layer" },
      { range: [-0.5, heads - 0.5], ticks: ticks(heads, 5), label: `head (${this.label})` }, TOP, bottom);
    const size = { width: 0.92 * (x(1) - x(0)), height: 0.9 * Math.abs(y(1) - y(0)) };
    const g = addNode(this.svg, "g", { role: "listbox", "aria-label": `${this.label}, layer by head` });
    this.cells = Array.from({ length: layers }, (_, layer) => Array.from({ length: heads }, (_, head) => {
      const at = { x: x(layer) - size.width / 2, y: y(head) - size.height / 2 };
      const cell = addNode(g, "rect", { ...at, ...size, ...OWN_KEYS, role: "option", tabindex: -1, class: "lrs-cell",
        "data-layer": layer, "data-head": head });
      addNode(cell, "title");
      cell.addEventListener("click", () => choose(layer, head, this));
      cell.addEventListener("keydown", (event) => this.press(event, layer, head));
      return cell;
    }));
  }

  /** Orange above 1, blue below it, in full at 2 and 0.5. */
  draw() {
    const rows = this.edited.numbers[this.name];
    if (areEqual(rows, this.drawn)) return;
    this.drawn = rows;
    this.cells.forEach((column, layer) => column.forEach((cell, head) => {
      const value = rows[layer][head], text = `layer ${layer}, head ${head}: ${this.label} ${value}`;
      setAttributes(cell, { fill: value < 1 ? BELOW : ABOVE, "fill-opacity": Math.min(1, Math.abs(Math.log2(value))),
        "aria-label": text, "data-value": value });
      cell.firstChild.textContent = text;
    }));
  }

  mark(layer, head) {
    this.cells.forEach((column, l) => column.forEach((cell, h) => {
      const isChosen = l === layer && h === head;
      setAttributes(cell, { "aria-selected": isChosen, tabindex: isChosen ? 0 : -1 });
    }));
  }

  press(event, layer, head) {
    if (!(event.key in CELL_MOVES)) return;
    event.preventDefault();
    event.stopPropagation();
    const { layers, heads } = this.edited.config, [right, up] = CELL_MOVES[event.key];
    this.choose(clamp(layer + right, 0, layers - 1), clamp(head + up, 0, heads - 1), this);
  }
}

/** Both maps, and below them the chosen head. */
class HeadEditor {
  constructor(el, edited) {
    Object.assign(this, { el, edited, layer: 0, head: 0 });
    this.maps = Object.keys(HEAD_NUMBERS).map((name) =>
      new HeadMap(addDiv(el, "lrs-column"), edited, name, (layer, head, map) => this.choose(layer, head, map)));
    const foot = addDiv(el, "lrs-foot lrs-head");
    this.chosen = document.createElement("strong");
    foot.append(this.chosen);
    this.sliders = Object.keys(HEAD_NUMBERS).map((name) => this.addSlider(foot, name));
    foot.append("(orange above 1, blue below it; in full at 2 and 0.5)");
    this.choose(0, 0);
  }

  remove() {
    this.el.replaceChildren();
  }

  draw() {
    this.maps.forEach((map) => map.draw());
    this.drawSliders();
  }

  drawSliders() {
    this.chosen.textContent = `layer ${this.layer}, head ${this.head}`;
    for (const { name, slider, output } of this.sliders) {
      const value = this.edited.numbers[name][this.layer][this.head];
      slider.value = value;
      slider.setAttribute("aria-label", `${HEAD_NUMBERS[name]} of layer ${this.layer}, head ${this.head}`);
      output.textContent = value;
    }
  }

  choose(layer, head, map = null) {
    Object.assign(this, { layer, head });
    this.maps.forEach((one) => one.mark(layer, head));
    map?.cells[layer][head].focus();
    this.drawSliders();
  }

  addSlider(foot, name) {
    const label = document.createElement("label"), slider = document.createElement("input");
    const output = document.createElement("output"), { step } = this.edited.config;
    Object.assign(slider, { type: "range", step, min: step * Math.ceil(0.1 / step - 1e-9), max: HIGHEST_OF_SLIDER });
    setAttributes(slider, OWN_KEYS);
    label.append(`${HEAD_NUMBERS[name]} `, slider, output);
    slider.addEventListener("pointerdown", () => this.edited.drag(true));
    slider.addEventListener("input", () => this.edited.setHead(name, this.layer, this.head, Number(slider.value)));
    for (const end of ["pointerup", "pointercancel"])
      slider.addEventListener(end, () => this.edited.isDragged && this.edited.drag(false));
    foot.append(label);
    return { name, slider, output };
  }
}
