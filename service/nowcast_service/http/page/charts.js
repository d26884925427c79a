// Pictures on a canvas: the loss of a training with its nowcasts, and how far each layer moved.

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

export const short = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return (value / 1e9).toFixed(2) + " B";
  if (size >= 1e6) return (value / 1e6).toFixed(1) + " M";
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  if (Number.isInteger(value)) return String(value);
  return size >= 1e-3 ? String(Number(value.toPrecision(4))) : value.toExponential(1);
};

// A canvas of as many pixels as the screen shows, and its drawing context in CSS pixels.
function sheet(canvas) {
  const dense = window.devicePixelRatio || 1, { width, height } = canvas.getBoundingClientRect();
  canvas.width = Math.max(1, Math.round(width * dense));
  canvas.height = Math.max(1, Math.round(height * dense));
  const pen = canvas.getContext("2d");
  pen.scale(dense, dense);
  pen.font = "12px system-ui, sans-serif";
  return { pen, width, height };
}

// Round numbers between two ends, about so many of them.
function ticks(low, high, about) {
  const rough = (high - low) / about, power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) || power;
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

// Outcome of each patch: the first verdict after it.
export function outcomes(events) {
  const found = [];
  let open = null;
  for (const event of events) {
    if (event.kind === "patched") { open = { ...event, became: "trial", until: null }; found.push(open); }
    else if (open && (event.kind === "kept" || event.kind === "rolled_back")) {
      open.became = event.kind === "kept" ? "kept" : "undone";
      open.until = event.step;
      open.why = event.reason;
      open = null;
    } else if (["rejected", "skipped", "failed", "shadow"].includes(event.kind)) found.push({ ...event, became: "none", until: null });
  }
  return found;
}

export class LossChart {
  constructor(canvas, read) {
    this.canvas = canvas; this.read = read; this.cursor = null; this.steps = []; this.losses = []; this.events = [];
    canvas.addEventListener("pointermove", (e) => this.point(e.offsetX));
    canvas.addEventListener("pointerleave", () => { this.cursor = null; this.draw(); });
    canvas.addEventListener("keydown", (e) => {
      const last = this.steps.length - 1, far = Math.max(1, Math.round(last / 50));
      const to = { ArrowLeft: -far, ArrowRight: far, Home: -last, End: last }[e.key];
      if (to === undefined || last < 0) return;
      e.preventDefault();
      this.cursor = Math.min(last, Math.max(0, (this.cursor ?? last) + to));
      this.draw();
    });
  }

  show(training) {
    this.steps = training.loss_steps; this.losses = training.losses; this.events = training.events;
    this.smooth = [];
    const keep = 1 - 1 / Math.max(2, Math.min(50, this.losses.length / 40));
    let level = null;
    for (const loss of this.losses) { level = level === null ? loss : keep * level + (1 - keep) * loss; this.smooth.push(level); }
    this.draw();
  }

  point(x) {
    if (!this.steps.length || !this.frame) return;
    const { left, right } = this.frame, first = this.steps[0], last = this.steps[this.steps.length - 1];
    const step = first + (x - left) / (right - left) * (last - first);
    let low = 0, high = this.steps.length - 1;
    while (low < high) { const middle = (low + high) >> 1; if (this.steps[middle] < step) low = middle + 1; else high = middle; }
    this.cursor = low;
    this.draw();
  }

  draw() {
    const { pen, width, height } = sheet(this.canvas), frame = { left: 56, right: width - 12, top: 12, bottom: height - 26 };
    this.frame = frame;
    pen.fillStyle = colour("quiet");
    if (this.steps.length < 2) {
      pen.fillText("No loss has been reported yet.", frame.left, height / 2);
      this.canvas.setAttribute("aria-label", "No loss has been reported yet.");
      return;
    }
    const log = this.log && this.losses.every((v) => v > 0), scale = log ? Math.log10 : (v) => v;
    // The first few losses of a training tower over the rest: the picture ends a little above what 99 of 100 stay under.
    const sorted = Float64Array.from(this.losses).sort();
    let low = scale(sorted[0]), high = scale(sorted[Math.floor((sorted.length - 1) * (log ? 1 : 0.99))]);
    const room = (high - low || Math.abs(high) || 1) * 0.08;
    low -= room; high += room;
    const first = this.steps[0], last = this.steps[this.steps.length - 1];
    const x = (step) => frame.left + (step - first) / (last - first || 1) * (frame.right - frame.left);
    const y = (loss) => frame.bottom - (Math.min(scale(loss), high) - low) / (high - low) * (frame.bottom - frame.top);
    pen.strokeStyle = colour("line"); pen.lineWidth = 1;
    for (const tick of ticks(low, high, 5)) {
      const at = frame.bottom - (tick - low) / (high - low) * (frame.bottom - frame.top);
      pen.beginPath(); pen.moveTo(frame.left, at); pen.lineTo(frame.right, at); pen.stroke();
      pen.textAlign = "right"; pen.fillText(short(log ? 10 ** tick : tick), frame.left - 6, at + 4);
    }
        for (const tick of ticks(first, last, Math.max(2, width / 130))) {
      pen.textAlign = x(tick) > frame.right - 24 ? "right" : "center";
      pen.fillText(short(tick), Math.min(x(tick), frame.right), height - 8);
    }
    const found = outcomes(this.events).filter((e) => e.step >= first);
    for (const event of found) {
      if (event.became === "none") continue;
      pen.fillStyle = colour(event.became); pen.globalAlpha = 0.13;
      pen.fillRect(x(event.step), frame.top, Math.max(1, x(Math.min(event.until ?? last, last)) - x(event.step)), frame.bottom - frame.top);
      pen.globalAlpha = 1;
    }
    this.line(pen, this.losses, x, y, colour("raw"), 1);
    this.line(pen, this.smooth, x, y, colour("smooth"), 2);
    for (const event of found) {
      pen.fillStyle = colour(event.became);
      const at = x(event.step), top = event.became === "none" ? frame.bottom - 8 : frame.top, size = event.became === "none" ? 4 : 6;
      pen.beginPath(); pen.moveTo(at - size, top); pen.lineTo(at + size, top); pen.lineTo(at, top + size * 1.5); pen.fill();
    }
    const count = (became) => found.filter((e) => e.became === became).length;
    const says = `Loss from ${short(this.losses[0])} at step ${short(first)} to ${short(this.smooth[this.smooth.length - 1])} at step ${short(last)}; `
      + `${count("kept")} nowcasts kept, ${count("undone")} undone, ${count("trial")} on trial, ${count("none")} not used. Arrow keys read values.`;
    this.canvas.setAttribute("aria-label", says);
    if (this.cursor === null || this.cursor >= this.steps.length) { this.read.textContent = ""; return; }
    const step = this.steps[this.cursor], near = found.filter((e) => Math.abs(x(e.step) - x(step)) < 5).map(tell);
    pen.strokeStyle = colour("quiet"); pen.beginPath(); pen.moveTo(x(step), frame.top); pen.lineTo(x(step), frame.bottom); pen.stroke();
    this.read.textContent = [`step ${short(step)}`, `loss ${short(this.losses[this.cursor])}`, `smoothed ${short(this.smooth[this.cursor])}`, ...near].join("  ·  ");
  }

  line(pen, values, x, y, stroke, width) {
    pen.strokeStyle = stroke; pen.lineWidth = width; pen.lineJoin = "round";
    pen.beginPath();
    values.forEach((value, i) => (i ? pen.lineTo(x(this.steps[i]), y(value)) : pen.moveTo(x(this.steps[i]), y(value))));
    pen.stroke();
  }
}

const tell = (event) => `${event.became === "none" ? event.kind.replace("_", " ") : "nowcast " + { kept: "kept", undone: "undone", trial: "on trial" }[event.became]}`
  + (event.why || event.reason ? `: ${event.why || event.reason}` : "");

export class HeatMap {
  constructor(canvas, read) {
    this.canvas = canvas; this.read = read; this.at = null; this.layers = []; this.movements = [];
    canvas.addEventListener("pointermove", (e) => { this.find(e.offsetX, e.offsetY); });
    canvas.addEventListener("pointerleave", () => { this.at = null; this.draw(); });
    canvas.addEventListener("keydown", (e) => {
      const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
      if (!move || !this.movements.length) return;
      e.preventDefault();
      const [column, row] = this.at || [this.movements.length - 1, 0];
      this.at = [Math.min(this.movements.length - 1, Math.max(0, column + move[0])), Math.min(this.layers.length - 1, Math.max(0, row + move[1]))];
      this.draw();
    });
  }

  show(training) { this.layers = training.layers; this.movements = training.movements; this.draw(); }

  find(x, y) {
    if (!this.frame || !this.movements.length) return;
    const { left, right, top, bottom } = this.frame;
    const column = Math.floor((x - left) / (right - left) * this.movements.length), row = Math.floor((y - top) / (bottom - top) * this.layers.length);
    this.at = column >= 0 && column < this.movements.length && row >= 0 && row < this.layers.length ? [column, row] : null;
    this.draw();
  }

  draw() {
    const { pen, width, height } = sheet(this.canvas), wide = Math.min(220, width * 0.3);
    const frame = { left: wide, right: width - 12, top: 8, bottom: height - 24 };
    this.frame = frame;
    pen.fillStyle = colour("quiet");
    if (!this.movements.length) {
      pen.fillText("Two snapshots show a movement.", 12, height / 2);
      this.canvas.setAttribute("aria-label", "Two snapshots show a movement; there are not two yet.");
      return;
    }
    const all = this.movements.flatMap((m) => m.moved).filter((v) => v > 0).map(Math.log10).sort((a, b) => a - b);
    const low = all[0] ?? -1, high = all[all.length - 1] ?? 0, span = high - low || 1;
    const across = (frame.right - frame.left) / this.movements.length, down = (frame.bottom - frame.top) / this.layers.length;
    this.movements.forEach((movement, column) => movement.moved.forEach((value, row) => {
      pen.fillStyle = value > 0 ? shade((Math.log10(value) - low) / span) : colour("line");
      pen.fillRect(frame.left + column * across, frame.top + row * down, Math.ceil(across), Math.ceil(down));
    }));
    pen.fillStyle = colour("quiet"); pen.textAlign = "right";
    const every = Math.ceil(14 / down);
    this.layers.forEach((name, row) => { if (row % every === 0) pen.fillText(cut(name, wide / 7), wide - 6, frame.top + (row + 0.5) * down + 4); });
    pen.textAlign = "left"; pen.fillText(`step ${short(this.movements[0].step)}`, frame.left, height - 7);
    pen.textAlign = "right"; pen.fillText(short(this.movements[this.movements.length - 1].step), frame.right, height - 7);
    const newest = this.movements[this.movements.length - 1], most = newest.moved.indexOf(Math.max(...newest.moved));
    this.canvas.setAttribute("aria-label", `${this.layers.length} layers over ${this.movements.length} strides, from ${(10 ** low).toExponential(1)} to `
      + `${(10 ** high).toExponential(1)}. In the newest, ${this.layers[most]} moved most, ${short(newest.moved[most])}. Arrow keys read values.`);
    if (!this.at) { this.read.textContent = ""; return; }
    const [column, row] = this.at;
    pen.strokeStyle = colour("ink"); pen.lineWidth = 2;
    pen.strokeRect(frame.left + column * across, frame.top + row * down, across, down);
    this.read.textContent = `${this.layers[row]}  ·  stride to step ${short(this.movements[column].step)}  ·  moved ${short(this.movements[column].moved[row])} of its size`;
  }
}

const cut = (name, most) => (name.length <= most ? name : "…" + name.slice(1 - most));

// From dark violet over orange to pale yellow, of even steps in lightness, readable in both schemes and by most eyes.
function shade(part) {
  const stops = [[38, 20, 72], [120, 28, 109], [203, 65, 84], [246, 141, 69], [252, 227, 150]];
  const at = Math.min(0.9999, Math.max(0, part)) * (stops.length - 1), i = Math.floor(at), f = at - i;
  return `rgb(${stops[i].map((v, c) => Math.round(v + (stops[i + 1][c] - v) * f)).join(",")})`;
}
