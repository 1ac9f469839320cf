// What can be sampled: base models and checkpoints, to choose one from; for samples and the playground.
import { get } from "./api.js";
import { h, number } from "./dom.js";

/** Base models and checkpoints by run, as `[group, [[id, text], ...]]`, and the two to begin with. */
export async function choices(signal) {
  const [models, runs, checkpoints] = await Promise.all(
    ["v1/base-models", "v1/runs", "v1/checkpoints"].map((path) => get(path, signal)));
  const names = new Map(runs.map((run) => [run.run_id, run.name || run.run_id]));
  const byRun = new Map();
  for (const one of checkpoints) byRun.set(one.run_id, [...(byRun.get(one.run_id) ?? []), one]);
  const groups = [...byRun].map(([id, saved]) => [names.get(id) ?? id,
    saved.map((one) => [one.path, `${one.name}, step ${number(one.step)}, of ${names.get(id) ?? id}`])]);
  const base = `base:${models[0]?.name}`;
  checkpoints.sort((a, b) => b.created_at.localeCompare(a.created_at));
  return {
    groups: [["Base models", models.map((model) => [`base:${model.name}`, `${model.name}, base model`])], ...groups],
    a: base, b: checkpoints[0]?.path ?? base,
  };
}

/** A labelled choice; one that is gone stays, and says so. */
export function picker(name, label, groups, wanted, props = {}) {
  const known = groups.some(([, options]) => options.some(([id]) => id === wanted));
  const gone = known ? [] : [["Not found", [[wanted, wanted]]]];
  return h("label", { class: "source" }, label, h("select", { name, ...props }, [...gone, ...groups].map(
    ([group, options]) => h("optgroup", { label: group }, options.map(
      ([id, text]) => h("option", { value: id, selected: id === wanted }, text))))));
}
