"use strict";
// Reads values at the pointer, and draws a panel again when it is smoothed, zoomed or filtered.
// Without this script the drawings of the page are complete.
const points = JSON.parse(document.getElementById("points").textContent);
const root = document.documentElement, find = id => document.getElementById(id);
const KEPT = "modern-llm report " + location.pathname;
const state = {smoothing: 0, log: false, from: null, to: null, hidden: [], theme: null, paused: false};
try { Object.assign(state, JSON.parse(sessionStorage.getItem(KEPT))); } catch {}
const keep = () => { try { sessionStorage.setItem(KEPT, JSON.stringify(state)); } catch {} };

// Theme
const dark = () => state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const paint = () => {
  if (state.theme) root.dataset.theme = state.theme;
  find("theme").setAttribute("aria-pressed", dark());
};
find("theme").addEventListener("click", () => { state.theme = dark() ? "light" : "dark"; paint(); keep(); });
paint();

// Numbers
const shown = value => {
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e7)) return value.toExponential(3).replace(/\.?0+e/, "e").replace("e+", "e");
  return String(Number(value.toPrecision(size >= 1000 ? 7 : 4)));
};
const nearest = (values, wanted) => values.reduce((best, v, i) => Math.abs(v - wanted) < Math.abs(values[best] - wanted) ? i : best, 0);
const smooth = (values, weight) => {
  let sum = 0, total = 0;
  return values.map(v => { sum = sum * weight + v * (1 - weight); total = total * weight + 1 - weight; return sum / total; });
};
const ticks = (low, high, count) => {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find(n => n * power >= rough * .999), found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
};
const logTicks = (low, high) => {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const n of Math.log10(high / low) > 3 ? [1] : [1, 2, 5]) found.push(Number((n * 10 ** power).toPrecision(3)));
  const inside = found.filter(v => v >= low * .999 && v <= high * 1.001);
  return inside.length > 1 ? inside : ticks(low, high, 4);
};

const shape = (parent, name, attributes = {}, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
};

class Panel {
  constructor(name, panel) {
    Object.assign(this, panel);
    this.figure = find(name); this.svg = this.figure.querySelector("svg"); this.readout = this.figure.querySelector(".readout");
    this.still = [...this.svg.children];
    this.box = this.svg.viewBox.baseVal;
    this.steps = [...new Set(this.series.flatMap(s => s.x))].sort((a, b) => a - b);
    this.layer = shape(this.svg, "g");
    this.cursor = shape(this.svg, "line", {class: "cursor", y1: this.top, y2: this.bottom, visibility: "hidden"});
    this.band = shape(this.svg, "rect", {class: "band", y: this.top, height: this.bottom - this.top, visibility: "hidden"});
    this.at = -1; this.start = null;
    this.listen();
  }
  get range() { return [state.from ?? this.low, state.to ?? this.high]; }
  x(step) { const [low, high] = this.range; return this.left + (step - low) / (high - low) * (this.right - this.left); }
  step(event) {
    const frame = this.svg.getBoundingClientRect(), [low, high] = this.range;
    const x = (event.clientX - frame.left) / frame.width * this.box.width;
    return Math.min(high, Math.max(low, low + (x - this.left) / (this.right - this.left) * (high - low)));
  }
  visible() { return this.series.filter(s => !state.hidden.includes(s.run)); }

  draw() {
    const plain = !state.smoothing && !state.log && state.from === null && !state.hidden.length;
    for (const element of this.still) element.style.display = plain ? "" : "none";
    this.layer.replaceChildren();
    this.cursor.setAttribute("visibility", "hidden"); this.readout.textContent = "";
    if (!plain) this.redraw();
  }
  redraw() {
    const [low, high] = this.range, lines = this.visible().map(s => {
      const smoothed = state.smoothing && !s.points ? smooth(s.y, state.smoothing) : s.y;
      const inside = s.x.map((x, i) => i).filter(i => s.x[i] >= low && s.x[i] <= high);
      return {...s, smoothed, inside};
    });
    const seen = lines.flatMap(s => s.inside.flatMap(i => s.min && !state.smoothing ? [s.min[i], s.max[i]] : state.smoothing ? [s.smoothed[i]] : [s.y[i]]));
    if (!seen.length) { shape(this.layer, "text", {x: (this.left + this.right) / 2, y: (this.top + this.bottom) / 2, "text-anchor": "middle"}, "no values here"); return; }
    let bottom = seen.reduce((a, b) => Math.min(a, b)), top = seen.reduce((a, b) => Math.max(a, b));
    const log = state.log && bottom > 0;
    const to = log ? Math.log10 : v => v, back = log ? v => 10 ** v : v => v;
    // Points have four digits: what differs by less is constant.
    const flat = top - bottom <= Math.abs(top) * 1e-4, room = flat ? Math.abs(to(top)) * .05 || 1 : (to(top) - to(bottom)) * .05;
    const [a, b] = [to(bottom) - room, to(top) + room];
    const y = v => this.bottom - (to(v) - a) / (b - a) * (this.bottom - this.top);
    for (const tick of log ? logTicks(back(a), back(b)) : ticks(a, b, 5)) {
      shape(this.layer, "line", {x1: this.left, x2: this.right, y1: y(tick), y2: y(tick), stroke: "var(--grid)", "stroke-width": .6});
      shape(this.layer, "text", {x: this.left - 4, y: y(tick) + 3, "text-anchor": "end"}, shown(tick) + this.unit);
    }
    for (const tick of ticks(low, high, 6).filter(Number.isInteger)) {
      shape(this.layer, "line", {x1: this.x(tick), x2: this.x(tick), y1: this.top, y2: this.bottom, stroke: "var(--grid)", "stroke-width": .6});
      shape(this.layer, "text", {x: this.x(tick), y: this.bottom + 11, "text-anchor": "middle"}, tick);
    }
    shape(this.layer, "text", {x: (this.left + this.right) / 2, y: this.bottom + 24, "text-anchor": "middle"}, "step");
    const [width, height] = [this.right - this.left, this.bottom - this.top];
    // A nested svg cuts off what is outside of the axes.
    const area = shape(this.layer, "svg", {x: this.left, y: this.top, width, height, viewBox: `${this.left} ${this.top} ${width} ${height}`});
    const path = (s, values) => s.x.map((x, i) => log && values[i] <= 0 ? "" : `${this.x(x).toFixed(2)},${y(values[i]).toFixed(2)}`).filter(Boolean).join(" ");
    for (const s of lines) {
      const stroke = `var(--run${s.colour})`, dash = s.dashed ? {"stroke-dasharray": "5 2.3"} : {};
      const line = (values, more) => shape(area, "polyline", {points: path(s, values), fill: "none", stroke, "stroke-width": 1.4, "stroke-linejoin": "round", ...dash, ...more});
      if (s.min && !state.smoothing) shape(area, "polygon", {points: path(s, s.min) + " " + path(s, s.max).split(" ").reverse().join(" "), fill: stroke, opacity: .18});
      if (s.smoothed !== s.y) line(s.y, {opacity: .25, "stroke-width": 1});
      line(s.smoothed);
      if (s.points) for (const i of s.inside) shape(area, "circle", {cx: this.x(s.x[i]), cy: y(s.y[i]), r: 1.5, fill: stroke});
    }
  }
  show(index) {
    this.at = Math.max(0, Math.min(this.steps.length - 1, index));
    const step = this.steps[this.at], x = this.x(step);
    this.cursor.setAttribute("x1", x); this.cursor.setAttribute("x2", x);
    this.cursor.setAttribute("visibility", x >= this.left - 1 && x <= this.right + 1 ? "visible" : "hidden");
    this.readout.textContent = `step ${step}: ` + this.visible().map(s => `${s.name} ${shown(s.y[nearest(s.x, step)])}${this.unit}`).join(", ");
  }
  listen() {
    const end = event => {
      if (this.start === null) return;
      const [from, to] = [this.start, this.step(event)].sort((a, b) => a - b), far = Math.abs(this.x(to) - this.x(from)) > 8;
      this.start = null; this.band.setAttribute("visibility", "hidden");
      if (far && event.type === "pointerup") zoom(from, to);
    };
    this.svg.addEventListener("pointerdown", event => { this.start = this.step(event); this.svg.setPointerCapture(event.pointerId); });
    this.svg.addEventListener("pointermove", event => {
      this.show(nearest(this.steps, this.step(event)));
      if (this.start === null) return;
      const [a, b] = [this.x(this.start), this.x(this.step(event))].sort((p, q) => p - q);
      this.band.setAttribute("x", a); this.band.setAttribute("width", b - a); this.band.setAttribute("visibility", "visible");
    });
    this.svg.addEventListener("pointerup", end);
    this.svg.addEventListener("pointercancel", end);
    this.svg.addEventListener("dblclick", () => zoom(null, null));
    this.figure.addEventListener("keydown", event => {
      const to = {ArrowLeft: this.at < 0 ? this.steps.length - 1 : this.at - 1, ArrowRight: this.at + 1, Home: 0, End: this.steps.length - 1}[event.key];
      const factor = {"+": .5, "-": 2}[event.key], at = this.at;
      if (to !== undefined) this.show(to);
      else if (event.key === "Escape") zoom(null, null);
      else if (factor) {
        const [low, high] = this.range, middle = at < 0 ? (low + high) / 2 : this.steps[at], half = (high - low) / 2 * factor;
        if (factor > 1 && half * 2 >= this.high - this.low) zoom(null, null); else zoom(middle - half, middle + half);
        if (at >= 0) this.show(at);
      } else return;
      event.preventDefault();
    });
  }
}

// Controls
const panels = Object.entries(points).map(([name, panel]) => new Panel(name, panel));
const last = panels.reduce((most, p) => Math.max(most, p.steps.at(-1)), 1);
const update = () => {
  find("smoothing").value = state.smoothing; find("smoothed").textContent = state.smoothing || "off";
  find("log").checked = state.log;
  find("from").value = state.from === null ? "" : Math.ceil(state.from); find("to").value = state.to === null ? "" : Math.floor(state.to);
  find("reset").disabled = state.from === null;
  for (const button of document.querySelectorAll("button.run")) button.setAttribute("aria-pressed", !state.hidden.includes(Number(button.value)));
  for (const panel of panels) panel.draw();
  keep();
};
// Both ends or none; a zoom that shows less than a step is widened.
function zoom(from, to) {
  if (from !== null) {
    from = Math.max(0, from); to = Math.min(last, to);
    if (to - from < 1) { from = Math.max(0, Math.floor(from) - 1); to = from + 2; }
  }
  state.from = from; state.to = to; update();
}
if (panels.length) {
  find("controls").hidden = false;
  find("smoothing").addEventListener("input", event => { state.smoothing = Number(event.target.value); update(); });
  find("log").addEventListener("change", event => { state.log = event.target.checked; update(); });
  for (const id of ["from", "to"]) find(id).addEventListener("change", () => {
    const [from, to] = ["from", "to"].map(name => find(name).value);
    const [a, b] = [from === "" ? 0 : Number(from), to === "" ? last : Number(to)].sort((p, q) => p - q);
    if (from === "" && to === "") zoom(null, null); else zoom(a, b);
  });
  find("reset").addEventListener("click", () => zoom(null, null));
  for (const button of document.querySelectorAll("button.run")) button.addEventListener("click", () => {
    const number = Number(button.value);
    state.hidden = state.hidden.includes(number) ? state.hidden.filter(n => n !== number) : [...state.hidden, number];
    update();
  });
  update();
}

// A page that is written again while its run is active loads itself again.
const live = find("live");
if (live) {
  live.checked = !state.paused;
  live.addEventListener("change", () => { state.paused = !live.checked; keep(); });
  setInterval(() => { if (live.checked && !document.hidden && panels.every(p => p.start === null)) location.reload(); }, 1000 * Number(live.value));
}
