// Curves of one run or several over each other, in a frame, read by pointer or arrow keys.
import { h, number } from "./dom.js";

const FALLS = /loss|error|nll|perplexity/;
const RISES = /reward|score|accuracy|eval|return|correct|solved/;

/** An average over what came before, that forgets by `weight` a point and begins unbiased. */
export function smoothed(points, weight) {
  let [total, norm] = [0, 0];
  return points.map(([step, value]) => {
    total = total * weight + value * (1 - weight);
    norm = norm * weight + (1 - weight);
    return [step, total / norm];
  });
}

/** The point of the best value, where the name of a curve tells which is better. */
export function best(name, points) {
  const way = FALLS.test(name) ? -1 : RISES.test(name) ? 1 : 0;
  return way && points.length > 1 ? points.reduce((a, b) => (way * b[1] > way * a[1] ? b : a)) : null;
}

/**
 * `curve`: { name, source, points: [[step, value], ...] }, or in place of points `lines`, each of
 * which has points, a label and a tone. `axis` says what a step is.
 */
export function chart(curve, { axis = (step) => `step ${number(step)}`, zero = false, smooth = 0 } = {}) {
  const { name, source = "", lines = [curve] } = curve;
  const raw = lines.map(({ points }) => points);
  const drawn = smooth ? raw.map((points) => smoothed(points, smooth)) : raw;
  const all = raw.flat();
  const [steps, values] = [all.map(([step]) => step), all.map(([, value]) => value)];
  const [low, high] = [Math.min(...values, ...(zero ? [0] : [])), Math.max(...values)];
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  const x = (step) => (last > first ? (100 * (step - first)) / (last - first) : 50);
  const y = (value) => (high > low ? 94 - (88 * (value - low)) / (high - low) : zero ? 94 : 50);
  const grid = lines.length > 1 ? [...new Set(steps)].sort((a, b) => a - b) : steps;
  const tops = raw.map((points) => best(name, points));
  const told = lines.map(({ label }, i) => [label ?? "", `${number(drawn[i].at(-1)[1])} at ${axis(raw[i].at(-1)[0])}`,
    tops[i] ? `best ${number(tops[i][1])} at ${axis(tops[i][0])}` : ""].filter(Boolean).join(", "));
  const label = `${name}${source && `, ${source}`}: ${told.join("; ")}; ` +
    `from ${number(low)} to ${number(high)}. Arrow keys read its values${tops.some(Boolean) ? ", B the best" : ""}.`;
  const path = (points, kind, i) => h("path", { class: `${kind} tone-${lines[i].tone ?? 0}`, d: pathOf(points.map(([step, value]) => [x(step), y(value)])) });
  return h("figure", { class: "curve", tabindex: 0, role: "group", "aria-label": label, curve: { grid, drawn, tops, x, y, axis } },
    h("figcaption", {}, h("strong", {}, name), source ? h("span", { class: "source" }, source) : null),
    h("div", { class: "values" }, lines.map(({ label, tone = 0 }, i) => h("p", {},
      label ? h("span", { class: `swatch tone-${tone}` }, label) : null,
      h("span", { class: "value" }, number(drawn[i].at(-1)[1])),
      tops[i] ? h("span", { class: "best" }, `best ${number(tops[i][1])} at ${axis(tops[i][0])}`) : null))),
    h("div", { class: "plot" },
      h("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" },
        [6, 50, 94].map((at) => h("line", { x1: 0, x2: 100, y1: at, y2: at })),
        smooth ? raw.map((points, i) => path(points, "faint", i)) : null,
        drawn.map((points, i) => path(points, "line", i))),
      h("i", { class: "cursor" }), lines.map(({ tone = 0 }) => h("i", { class: `dot tone-${tone}` })),
      high > low ? h("span", { class: "high" }, tick(high)) : null,
      h("span", { class: high > low || zero ? "low" : "middle" }, tick(low))),
    h("div", { class: "steps" }, h("span", {}, axis(first)),
      h("span", {}, last > first ? axis(last) : "")));
}

function pathOf(places) {
  const line = places.map(([x, y]) => `${x.toFixed(2)},${y.toFixed(2)}`);
  return line.length > 1 ? `M${line.join("L")}` : `M${line[0]}h0`;
}

/** Three digits, and few characters beside them: what stands at an axis has little room. */
function tick(value) {
  const size = Math.abs(value);
  if (size < 1e3 || size >= 1e15) return number(Number(value.toPrecision(3)));
  return value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 }).replace("-", "−");
}

function show(figure, at) {
  const { grid, drawn, x, y, axis } = figure.curve;
  const reading = at !== null;
  figure.at = reading ? Math.max(0, Math.min(grid.length - 1, at)) : null;
  const place = grid[figure.at ?? grid.length - 1];
  figure.classList.toggle("reading", reading);
  const values = figure.querySelector(".values");
  values.setAttribute("aria-live", reading ? "polite" : "off"); // not whenever the page is read again
  const [readouts, dots] = [values.querySelectorAll(".value"), figure.querySelectorAll(".dot")];
  drawn.forEach((points, i) => {
    const point = !reading ? points.at(-1)
      : drawn.length === 1 ? points[figure.at] : points.findLast(([step]) => step <= place);
    readouts[i].textContent = !point ? "–" : reading ? `${axis(point[0])}: ${number(point[1])}` : number(point[1]);
    dots[i].hidden = !point;
    if (!point) return;
    dots[i].style.left = `${x(point[0])}%`;
    dots[i].style.top = `${y(point[1])}%`;
  });
  figure.querySelector(".cursor").style.left = `${x(place)}%`;
}

/** After curves below `root` have changed: those that are being read stay so. */
export function reread(root) {
  for (const figure of root.querySelectorAll(".curve")) {
    if (typeof figure.at === "number") show(figure, figure.at);
  }
}

const curveOf = (event) => event.target.closest?.(".curve");

export function listen(root) {
  root.addEventListener("pointermove", (event) => {
    const figure = curveOf(event);
    if (!figure) return;
    const { left, width } = figure.querySelector(".plot").getBoundingClientRect();
    const wanted = (100 * (event.clientX - left)) / width;
    const away = figure.curve.grid.map((step) => Math.abs(figure.curve.x(step) - wanted));
    show(figure, away.indexOf(Math.min(...away)));
  });
  for (const name of ["pointerout", "focusout"]) {
    root.addEventListener(name, (event) => {
      const figure = curveOf(event);
      if (figure && !figure.contains(event.relatedTarget)) show(figure, null);
    });
  }
  root.addEventListener("keydown", (event) => {
    const figure = curveOf(event);
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    const top = event.key === "b" && !event.ctrlKey && !event.metaKey && figure?.curve.tops.find(Boolean);
    if (!figure || !(step || top)) return;
    event.preventDefault();
    show(figure, top ? figure.curve.grid.indexOf(top[0]) : (figure.at ?? figure.curve.grid.length) + step);
  });
}
