// Curves of one run or several over each other, for the report and the comparison: found, smoothed,
// grouped, with one cursor through all. A page calls `startCurves` with its runs.
const W = 320, H = 128, LEFT = 44, RIGHT = 8, TOP = 10, BOTTOM = 18, COLOURED = 8;
const SECTIONS = [
  ["Reward", ["reward/mean", "eval/mean", "eval", "reward", "score"]],
  ["Data sets", ["dataset"]],
  ["Training", ["train/loss", "train/kl_k3", "train/entropy", "train", "policy"]],
  ["Credit", ["credit", "kl"]],
  ["Sampler and trainer", ["off_policy", "gap", "staleness"]],
  ["Rollouts", ["rollout", "groups", "tools"]],
  ["Lengths", ["tokens"]],
  ["Time", ["time"]],
];
const charts = [], view = { index: 0, smooth: 0, axis: "step", grid: [] };
let RUNS = [], opened = null;

const numbers = (list) => list.filter((v) => v !== null);

function smoothed(values, weight) {
  let total = 0, norm = 0;
  return values.map((v) => {
    if (v === null) return null;
    total = total * weight + v * (1 - weight);
    norm = norm * weight + (1 - weight);
    return total / norm;
  });
}

function ticks(low, high) {
  const rough = (high - low) / 3, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return found;
}

function bounds(values) {
  let low = Math.min(...values), high = Math.max(...values);
  if (low >= 0 && high <= 1 && high > 0.25) return [0, 1];
  if (low > 0 && low < 0.5 * high) low = 0;
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low === 0 ? 0 : low - room, high + room];
}

// The last place of a sorted list that is not behind `x`; 0 where all are.
function until(list, x) {
  let i = list.findLastIndex((v) => v <= x);
  return Math.max(0, i);
}

function series(run, name, X, Y, svg) {
  const values = run.metrics[name], XS = run.axes[view.axis];
  const style = { class: "run-" + run.number % COLOURED + (run.number >= COLOURED ? " dashed" : "") };
  const [lower, upper] = ["low", "high"].map((end) => name.endsWith("/mean") && run.metrics[name.replace(/mean$/, end)] || []);
  const path = (list) => list.map((v, i) => v === null ? "" : "L" + X(XS[i]).toFixed(1) + " " + Y(v).toFixed(1)).join("").replace("L", "M");
  const raw = el("path", { class: "raw", d: path(values) }), line = el("path", { class: "line" }), dot = el("circle", { class: "dot", r: RUNS.length > 1 ? 3 : 4 });
  const group = el("g", style);
  if (lower.length) {
    const there = [...XS.keys()].filter((i) => lower[i] !== null && upper[i] !== null);
    const at = (list) => (i) => X(XS[i]).toFixed(1) + " " + Y(list[i]).toFixed(1);
    if (there.length) group.append(el("path", { class: "band", d: "M" + [...there.map(at(upper)), ...there.reverse().map(at(lower))].join("L") + "Z" }));
  }
  group.append(raw, line, dot);
  svg.append(group);
  const value = el("b", style);
  const update = (x) => {
    const list = view.smooth ? smoothed(values, view.smooth) : values;
    group.classList.toggle("gone", run.hidden);
    value.hidden = run.hidden;
    raw.classList.toggle("faint", view.smooth > 0);
    line.setAttribute("d", view.smooth ? path(list) : "");
    let i = until(XS, x);
    while (i > 0 && list[i] === null) i--;
    const v = list[i] ?? null;
    dot.setAttribute("cx", X(XS[i])); dot.setAttribute("cy", v === null ? -99 : Y(v));
    value.textContent = number(v);
    return (run.label ? run.label + " " : "") + "step " + run.steps[i] + ": " + number(v);
  };
  return { run, value, update };
}

function chart(name) {
  const log = name.startsWith("gap/"), scale = (v) => log ? Math.log10(Math.max(v, 1e-9)) : v;
  const runs = RUNS.filter((run) => run.metrics[name]), ends = name.endsWith("/mean") ? ["low", "high"].map((end) => name.replace(/mean$/, end)) : [];
  const known = runs.flatMap((run) => [name, ...ends].flatMap((key) => numbers(run.metrics[key] ?? []))).map(scale);
  const [low, high] = log ? [Math.floor(Math.min(...known)), Math.ceil(Math.max(...known) + 1e-9)] : bounds(known), x0 = view.grid[0], x1 = view.grid.at(-1);
  const X = (at) => LEFT + (x1 === x0 ? 0.5 : (at - x0) / (x1 - x0)) * (W - LEFT - RIGHT);
  const Y = (v) => H - BOTTOM - (scale(v) - low) / (high - low || 1) * (H - TOP - BOTTOM);
  const svg = el("svg", { viewBox: `0 0 ${W} ${H}`, "aria-hidden": "true" });
  for (const place of ticks(low, high).filter((t) => !log || Number.isInteger(t))) {
    const tick = log ? 10 ** place : place;
    const label = el("text", { x: LEFT - 6, y: Y(tick) + 3.5, "text-anchor": "end" }, number(Number(tick.toPrecision(6))));
    svg.append(el("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: Y(tick), y2: Y(tick) }), label);
  }
  svg.append(el("text", { x: LEFT, y: H - 4 }, number(x0)), el("text", { x: W - RIGHT, y: H - 4, "text-anchor": "end" }, number(x1)));
  const cursor = el("line", { class: "cursor", y1: TOP - 4, y2: H - BOTTOM });
  const drawn = runs.map((run) => series(run, name, X, Y, svg));
  svg.append(cursor);
  const card = el("div", { class: "card", tabindex: "0", role: "slider", "aria-label": name, "aria-valuemin": x0, "aria-valuemax": x1 }, el("div", { class: "name" }, el("span", {}, name), el("span", { class: "values" }, ...drawn.map((one) => one.value))), svg);
  const update = () => {
    const x = view.grid[view.index];
    cursor.setAttribute("x1", X(x)); cursor.setAttribute("x2", X(x));
    const said = drawn.map((one) => [one.run.hidden, one.update(x)]);
    card.setAttribute("aria-valuenow", x);
    card.setAttribute("aria-valuetext", said.filter(([hidden]) => !hidden).map(([, text]) => text).join("; "));
  };
  card.onpointermove = (event) => {
    const box = svg.getBoundingClientRect();
    const at = x0 + ((event.clientX - box.left) / box.width * W - LEFT) / (W - LEFT - RIGHT) * (x1 - x0);
    let best = 0;
    view.grid.forEach((x, i) => { if (Math.abs(x - at) < Math.abs(view.grid[best] - at)) best = i; });
    move(best);
  };
  card.onclick = () => opened?.(view.index);
  card.onkeydown = (event) => {
    const jump = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 }[event.key];
    if (jump) { move(view.index + jump); event.preventDefault(); }
    if (event.key === "Enter") opened?.(view.index);
  };
  charts.push({ name, card, update });
  return card;
}

function move(index) {
  view.index = Math.min(view.grid.length - 1, Math.max(0, index));
  for (const one of charts) if (!one.card.hidden) one.update();
}

// Where a metric stands: its section, and its place there; exact names go before their prefix.
function place(name) {
  for (const [i, [, keys]] of SECTIONS.entries()) {
    const exact = keys.indexOf(name), prefix = keys.indexOf(name.split("/")[0]);
    if (exact >= 0 || prefix >= 0) return [i, exact >= 0 ? exact : prefix];
  }
  return [SECTIONS.length, 0];
}

function varies(name) { // by more than rounding, over all runs
  const known = RUNS.flatMap((run) => numbers(run.metrics[name] ?? [])), top = Math.max(...known), low = Math.min(...known);
  return top - low > 1e-5 * Math.max(Math.abs(top), Math.abs(low));
}

function drawCurves() {
  // Of one run as it is, so that a place of the grid is one of its steps.
  const axes = RUNS.map((run) => run.axes[view.axis]);
  view.grid = axes.length === 1 ? axes[0] : [...new Set(axes.flat())].sort((a, b) => a - b);
  charts.length = 0;
  $("curves").replaceChildren();
  const all = [...new Set(RUNS.flatMap((run) => Object.keys(run.metrics)))], there = new Set(all), sections = new Map();
  const banded = (name) => /\/(low|high)$/.test(name) && there.has(name.replace(/[^/]*$/, "mean"));
  const names = all.filter((name) => !banded(name) && RUNS.some((run) => numbers(run.metrics[name] ?? []).length)).sort((a, b) => place(a)[1] - place(b)[1] || a.localeCompare(b));
  for (const name of names) sections.set(place(name)[0], [...(sections.get(place(name)[0]) ?? []), name]);
  for (const [i, names] of [...sections].sort(([a], [b]) => a - b)) {
    const section = el("div", { class: "curve-section" }, el("h3", {}, SECTIONS[i]?.[0] ?? "Others"), el("div", { class: "cards" }, ...names.filter(varies).map(chart)));
    const constant = names.filter((name) => !varies(name)), value = (name) => RUNS.flatMap((run) => numbers(run.metrics[name] ?? []))[0];
    if (constant.length) section.append(el("div", { class: "chips" }, "Constant:", ...constant.map((name) => el("span", { "data-name": name }, name + " ", el("b", {}, number(value(name)))))));
    $("curves").append(section);
  }
  if (!sections.size) $("curves").append(el("p", { class: "muted" }, "No step was logged yet."));
}

function find() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const hit = (name) => words.every((word) => name.toLowerCase().includes(word));
  for (const one of charts) { one.card.hidden = !hit(one.name); one.update(); }
  for (const chip of document.querySelectorAll(".chips span")) chip.hidden = !hit(chip.dataset.name);
  for (const section of document.querySelectorAll(".curve-section")) section.hidden = !section.querySelector(".card:not([hidden]), .chips span:not([hidden])");
}

// runs: of each its steps and, by name, a value or null for each step; a label where there are several.
// open: called with the index of the step of a curve that is clicked.
function startCurves(runs, open = null) {
  RUNS = runs.map((run, number) => {
    let carried = 0; // the tokens sampled until a step, carried on where none were
    const tokens = (run.metrics["tokens/total"] ?? []).map((v) => carried = v ?? carried);
    return { ...run, number, hidden: false, axes: { step: run.steps, tokens } };
  });
  opened = open;
  $("axis-label").hidden = !RUNS.every((run) => run.axes.tokens.length);
  $("filter").oninput = find;
  $("smooth").oninput = () => { view.smooth = Number($("smooth").value); move(view.index); };
  $("axis").onchange = () => { view.axis = $("axis").value; drawCurves(); find(); move(RUNS.length > 1 ? view.grid.length : view.index); };
  drawCurves();
  move(view.grid.length);
}

