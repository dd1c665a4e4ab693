// All panels together.

function addCopyButton(el, edited) {
  const button = document.createElement("button");
  button.className = "jupyter-button lrs-copy";
  button.textContent = "Copy as Python";
  button.addEventListener("click", async () => {
    try {
      if (edited.isAhead) throw new Error("busy");
      await navigator.clipboard.writeText(edited.model.get("state").python);
      button.textContent = "Copied";
    } catch {
      button.textContent = edited.isAhead ? "Not yet: the kernel is busy" : "No clipboard here: copy it from below";
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

/** A panel that is there only while there is something to show in it. */
class Optional {
  constructor(make, isNeeded) {
    Object.assign(this, { make, isNeeded, panel: null });
  }

  draw() {
    if (this.isNeeded()) (this.panel ??= this.make()).draw();
    else this.panel?.remove(), (this.panel = null);
  }
}

function render({ model, el }) {
  el.classList.add("lrs-playground");
  setAttributes(el, OWN_KEYS);
  const [left, right, row, foot] = ["lrs-column", "lrs-column", "lrs-row", "lrs-foot"].map((name) => addDiv(el, name));
  const edited = new Edited(model, () => draw());
  const panels = [
    new CurveEditor(left, edited),
    new Chart(right, edited),
    new Optional(() => new Bars(left, edited, "temperatures", "temperature", 170, 130), () => edited.numbers.temperatures),
    new Optional(() => new DifferenceChart(right, edited), () => model.get("state").difference),
    new Optional(() => new HeadEditor(row, edited), () => edited.numbers.head_gains),
  ];
  const draw = () => panels.forEach((panel) => panel.draw());
  addCopyButton(foot, edited);
  addStatus(foot, model);
  model.on("change:state", draw);
  draw();
}

export default { render };
