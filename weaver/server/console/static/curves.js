// The curves of a run, and of others laid over it: grouped by the first part of their names, found, smoothed.
import { chart } from "./chart.js";
import { h, morph } from "./dom.js";

const LOGGED = "Logged";
const GROUPS = ["reward", "eval", "score", LOGGED, "dataset", "train", "policy", "credit", "kl", "off_policy", "gap",
  "staleness", "rollout", "groups", "tools", "tokens", "time"];
const FIRST = ["reward", "reward/mean", "eval/mean", "loss", "accuracy", "grad_norm", "learning_rate"];
const place = (list, name) => { const at = list.indexOf(name); return at < 0 ? list.length : at; };

/** What the section was told to find and to smooth by is in `params`; `changed` hears when it is not. */
export function curveSection(params, changed) {
  const shown = h("div", {}, h("p", { class: "quiet" }, "Loading the curves."));
  let runs = null;
  const set = (name, value) => {
    if (value) params.set(name, value);
    else params.delete(name);
    changed();
    draw(runs);
  };
  const find = h("input", { id: "filter", type: "search", placeholder: "reward, kl, time …", autocomplete: "off",
    value: params.get("find") ?? "", input: () => set("find", find.value.trim()) });
  const smooth = h("input", { id: "smooth", type: "range", min: 0, max: 0.95, step: 0.05, value: params.get("smooth") ?? 0,
    input: () => set("smooth", Number(smooth.value) ? smooth.value : "") });
  function draw(now) {
    runs = now;
    if (!runs) return;
    const curves = together(runs);
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = curves.filter(({ name }) => words.every((word) => name.toLowerCase().includes(word)));
    const empty = curves.length ? "No curve has this in its name."
      : "Nothing yet. Losses appear with forward_backward, everything that a program logs with log_metrics.";
    morph(shown.firstChild, found.length
      ? h("div", {}, grouped(found).map(([title, members]) => h("section", { "aria-label": title },
        h("h3", {}, title),
        h("div", { class: "curves" }, members.map((curve) => chart(curve, { smooth: Number(smooth.value) }))))))
      : h("p", { class: "quiet" }, empty));
  }
  const node = h("section", { "aria-labelledby": "curves" },
    h("div", { class: "bar" }, h("h2", { id: "curves" }, "Curves"),
      h("label", {}, "Find", find), h("label", {}, "Smooth", smooth)), shown);
  return { node, draw };
}

/** Of all runs, curves by name and source, each with a line for every run that has it. */
function together(runs) {
  const curves = new Map();
  for (const { label, tone, curves: mine } of runs) {
    for (const { name, source, points } of mine) {
      const key = `${source} ${name}`;
      const curve = curves.get(key) ?? { name, answered: source === "logged" ? "" : source.replaceAll("_", " "), lines: [] };
      curve.lines.push({ points, tone, ...(runs.length > 1 ? { label } : {}) });
      curves.set(key, curve);
    }
  }
  return [...curves.values()];
}

/** [title, curves] of each group: what was logged by the prefix of its name, what was answered by the operation. */
function grouped(curves) {
  const prefixes = new Set(curves.filter(({ name, answered }) => !answered && name.includes("/")).map(({ name }) => name.split("/")[0]));
  const title = ({ name, answered }) => answered || (prefixes.has(name.split("/")[0]) ? name.split("/")[0] : LOGGED);
  const groups = new Map();
  for (const curve of curves) groups.set(title(curve), [...(groups.get(title(curve)) ?? []), curve]);
  const rank = ([title, [{ answered }]]) => (answered ? 1000 : place(GROUPS, title));
  const ordered = [...groups].sort((a, b) => rank(a) - rank(b) || a[0].localeCompare(b[0]));
  for (const [, members] of ordered) {
    members.sort((a, b) => place(FIRST, a.name) - place(FIRST, b.name) || a.name.localeCompare(b.name));
  }
  return ordered;
}
