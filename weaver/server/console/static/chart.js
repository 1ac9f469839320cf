// A curve as an SVG path, read by pointer or arrow keys.
import { h, number } from "./dom.js";

/** `curve`: { name, source, points: [[step, value], ...], last }; `axis` says what a step is. */
export function chart(curve, { axis = (step) => `step ${number(step)}`, zero = false } = {}) {
  const { name, source, points } = curve;
  const [steps, values] = [points.map(([step]) => step), points.map(([, value]) => value)];
  const [low, high] = [Math.min(...values, ...(zero ? [0] : [])), Math.max(...values)];
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  const x = (step) => (last > first ? (100 * (step - first)) / (last - first) : 50);
  const y = (value) => (high > low ? 94 - (88 * (value - low)) / (high - low) : zero ? 94 : 50);
  const line = points.map(([step, value]) => `${x(step).toFixed(2)},${y(value).toFixed(2)}`);
  const path = points.length > 1 ? `M${line.join("L")}` : `M${line[0]}h0`;
  const label = `${name}, ${source}: ${number(curve.last)} at ${axis(steps.at(-1))}, ` +
    `from ${number(low)} to ${number(high)}. Arrow keys read its values.`;
  return h("figure", { class: "curve", tabindex: 0, role: "group", "aria-label": label, curve: { points, x, y, axis } },
    h("figcaption", {},
      h("strong", {}, name), h("span", { class: "source" }, source),
      h("span", { class: "value" }, number(curve.last))),
    h("div", { class: "plot" },
      h("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" },
        [6, 50, 94].map((at) => h("line", { x1: 0, x2: 100, y1: at, y2: at })),
        h("path", { d: path })),
      h("i", { class: "cursor" }), h("i", { class: "dot" }),
      high > low ? h("span", { class: "high" }, number(high)) : null,
      h("span", { class: high > low || zero ? "low" : "middle" }, number(low))),
    h("div", { class: "steps" }, h("span", {}, axis(first)),
      h("span", {}, last > first ? axis(last) : "")));
}

function show(figure, at) {
  const { points, x, y, axis } = figure.curve;
  const reading = at !== null;
  figure.at = reading ? Math.max(0, Math.min(points.length - 1, at)) : null;
  const [step, value] = points[figure.at ?? points.length - 1];
  figure.classList.toggle("reading", reading);
  const readout = figure.querySelector(".value");
  readout.setAttribute("aria-live", reading ? "polite" : "off"); // not whenever the page is read again
  readout.textContent = reading ? `${axis(step)}: ${number(value)}` : number(value);
  const [cursor, dot] = [figure.querySelector(".cursor"), figure.querySelector(".dot")];
  cursor.style.left = dot.style.left = `${x(step)}%`;
  dot.style.top = `${y(value)}%`;
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
    const away = figure.curve.points.map(([step]) => Math.abs(figure.curve.x(step) - wanted));
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
    if (!figure || !step) return;
    event.preventDefault();
    show(figure, (figure.at ?? figure.curve.points.length) + step);
  });
}
