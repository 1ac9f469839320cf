// The page of a run: facts, curves, operations, checkpoints, and what can be done to them.
import { operate, opener } from "./actions.js";
import { get, messageOf } from "./api.js";
import { reread } from "./chart.js";
import { curveSection } from "./curves.js";
import { bytes, facts, h, link, morph, number, span, table, when } from "./dom.js";

export const MOST_RUNS = 6;
const LISTED = 8;

export const stateOf = (run) => h("span", { class: `state ${run.status}` }, run.status);
const titleOf = (run) => run.name || run.run_id;
const address = (id, params) => `#/runs/${encodeURIComponent(id)}${params.size ? `?${params}` : ""}`;

export async function runPage(main, { live, rest: [id], params, caller, signal }) {
  const others = [...new Set((params.get("with") ?? "").split(","))].filter((one) => one && one !== id).slice(0, MOST_RUNS - 1);
  const part = () => h("div", {}, h("p", { class: "quiet" }));
  const [head, legend, below] = [part(), part(), part()];
  const notice = h("p", { class: "done", role: "status" });
  const curves = curveSection(params, () => history.replaceState(null, "", address(id, params)));
  const page = h("div", {}, head, notice, legend, curves.node, below);
  head.firstChild.textContent = "Loading the run.";
  main.replaceChildren(page);
  const known = { run: null, checkpoints: [] };
  const path = `v1/runs/${encodeURIComponent(id)}`;
  const look = async () => {
    const [run, mine, operations, checkpoints, ...theirs] = await Promise.all([
      get(path, signal), get(`${path}/curves`, signal), get(`${path}/operations`, signal),
      get(`v1/checkpoints?run_id=${encodeURIComponent(id)}`, signal), ...others.map((other) => read(other, signal)),
    ]);
    Object.assign(known, { run, checkpoints });
    const runs = [{ run, curves: mine }, ...theirs];
    const there = runs.filter((one) => one.run);
    morph(head.firstChild, heading(run, caller));
    morph(legend.firstChild, legendOf(runs, params));
    curves.draw(there.map((one) => ({ label: titleOf(one.run), tone: runs.indexOf(one), curves: one.curves })));
    morph(below.firstChild, h("div", {}, operationSection(operations), checkpointSection(run, checkpoints)));
    reread(main);
  };
  operate(page, { known, notice, look });
  await live(3, look);
}

/** Another run, laid over this one; one that is gone takes nothing from the page. */
async function read(id, signal) {
  const path = `v1/runs/${encodeURIComponent(id)}`;
  try {
    const [run, curves] = await Promise.all([get(path, signal), get(`${path}/curves`, signal)]);
    return { id, run, curves };
  } catch (error) {
    if (error.status !== 404) throw error;
    return { id, run: null };
  }
}

function heading(run, caller) {
  const { lora_config: lora, user_metadata: { name, ...metadata } } = run;
  const pairs = [
    ...(caller.admin ? [["Project", run.project]] : []),
    ["Base model", run.base_model],
    ["Training", lora ? `LoRA, rank ${lora.rank}, alpha ${number(lora.alpha)}` : "all weights"],
    ["Steps", number(run.step)], ["State", stateOf(run)],
    ["Last activity", when(run.last_request_at)], ["Created", when(run.created_at)],
  ];
  const extra = Object.entries(metadata).map(([field, value]) => [field, typeof value === "string" ? value : JSON.stringify(value)]);
  return h("section", {},
    h("p", { class: "crumb" }, link("#/runs", "Runs")),
    h("div", { class: "head" }, h("h1", {}, titleOf(run)),
      h("div", { class: "acts" }, opener("rename", "Rename"),
        opener("stop", "Stop", { reason: run.status === "stopped" ? "It is stopped already." : "" }),
        opener("delete", "Delete"))),
    run.name ? h("p", { class: "quiet" }, h("code", {}, run.run_id)) : null,
    facts([...pairs, ...extra]));
}

function legendOf(runs, params) {
  const [{ run }, ...others] = runs;
  const choose = link(`#/runs?${new URLSearchParams({ with: [run.run_id, ...others.map((one) => one.id)].join() })}`, others.length ? "Compare others" : "Compare with other runs");
  if (!others.length) return h("p", { class: "crumb" }, choose);
  const without = (id) => {
    const rest = new URLSearchParams(params);
    const left = others.map((one) => one.id).filter((one) => one !== id);
    if (left.length) rest.set("with", left.join());
    else rest.delete("with");
    return address(run.run_id, rest);
  };
  return h("ul", { class: "legend", "aria-label": "Runs compared" },
    h("li", {}, h("span", { class: "swatch tone-0" }, titleOf(run))),
    others.map((one, i) => h("li", {},
      one.run ? h("a", { class: `swatch tone-${i + 1}`, href: `#/runs/${encodeURIComponent(one.id)}` }, titleOf(one.run))
        : h("span", { class: "problem" }, `${one.id} is not found`),
      " ", h("a", { class: "quiet", href: without(one.id), "aria-label": `Leave out ${one.run ? titleOf(one.run) : one.id}` }, "leave out"))),
    h("li", {}, choose));
}

function operationSection({ pending, num_pending, ended }) {
  const columns = [["Operation"], ["Seq", "figure"], ["State"], ["Waited", "figure"], ["Ran", "figure"], ["Outcome", "long"]];
  const row = (one) => [
    one.kind.replaceAll("_", " "), one.seq === null ? "" : number(one.seq),
    h("span", { class: `state ${one.state}` }, one.state), span(one.waited_s),
    one.state === "waiting" ? "" : span(one.ran_s),
    one.error ? [messageOf(one.error), one.error.hint ? h("small", {}, one.error.hint) : null] : brief(one.metrics),
  ];
  const short = (label, titles, rows, more, empty) => [table(label, titles, rows.slice(0, LISTED), empty),
    rows.length > LISTED
      ? h("details", {}, h("summary", {}, more), table(label, titles, rows.slice(LISTED)))
      : null];
  const waiting = pending.map((one) => row(one).slice(0, 5));
  return h("section", { "aria-labelledby": "operations" }, h("h2", { id: "operations" }, "Operations"),
    h("h3", {}, `Pending${num_pending ? ` (${number(num_pending)})` : ""}`),
    short("Pending operations", columns.slice(0, 5), waiting,
      num_pending > waiting.length ? `The first ${waiting.length}` : `${waiting.length - LISTED} more`, "Nothing waits or runs."),
    h("h3", {}, "Lately ended"),
    short("Ended operations", columns, ended.map(row), `${ended.length - LISTED} before`, "None since the server started."));
}

function brief(metrics) {
  const known = ["loss", "num_tokens", "grad_norm", "learning_rate", "tokens"].filter((name) => name in metrics);
  return known.map((name) => `${name.replaceAll("_", " ")} ${number(metrics[name])}`).join(", ");
}

function checkpointSection(run, checkpoints) {
  const base = encodeURIComponent(`base:${run.base_model}`);
  const newest = [...checkpoints].sort((a, b) => b.created_at.localeCompare(a.created_at));
  const life = (one) => (one.expires_at ? ["expires ", when(one.expires_at)] : "kept");
  const acts = (one) => h("div", { class: "acts" },
    link(`#/samples?a=${base}&b=${encodeURIComponent(one.path)}`, "Sample"),
    [["copy", "Copy path"], ["keep", "Lifetime"], ["export", "Export"], ["drop", "Delete"]].map(
      ([act, words]) => opener(act, words, { path: one.path, label: `${words}: ${one.name}, ${one.kind.replaceAll("_", " ")}` })));
  return h("section", { "aria-labelledby": "checkpoints" }, h("h2", { id: "checkpoints" }, "Checkpoints"),
    table("Checkpoints",
      [["Name", "name"], ["Holds"], ["Step", "figure"], ["Size", "figure"], ["Time to live"], ["Saved"], ["", "end"]],
      newest.map((one) => [
        h("span", { title: one.path }, one.name), one.kind.replaceAll("_", " "), number(one.step),
        bytes(one.size_bytes), life(one), when(one.created_at), acts(one),
      ]), "None are saved."));
}
