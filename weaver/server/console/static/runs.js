// The list of runs, and the page of one: curves, operations, checkpoints.
import { get } from "./api.js";
import { chart, reread } from "./chart.js";
import { bytes, facts, h, link, morph, number, span, table, when } from "./dom.js";

const FIRST = ["reward", "reward/mean", "eval/mean", "loss", "accuracy", "grad_norm", "learning_rate"];
const SHOWN = 6;
const LISTED = 8;

const nameOf = (run) => run.name ?? "";
const stateOf = (run) => h("span", { class: `state ${run.status}` }, run.status);

export async function runsPage(main, { live }) {
  const filter = h("input", {
    id: "filter", type: "search", placeholder: "Filter", "aria-label": "Filter the runs by name, id or model",
    input: () => draw(),
  });
  const list = h("div", {}, h("p", { class: "quiet" }, "Loading the runs."));
  main.replaceChildren(h("div", { class: "head" }, h("h1", {}, "Runs"), filter), list);
  let runs = null;
  function draw() {
    if (!runs) return;
    const wanted = filter.value.trim().toLowerCase();
    const shown = runs.filter((run) =>
      `${run.run_id} ${nameOf(run)} ${run.base_model}`.toLowerCase().includes(wanted));
    const empty = runs.length
      ? "No run has this in its name, id or model."
      : "There are no runs yet. A program makes one with create_model; it then appears here.";
    morph(list.firstChild, table("Runs",
      [["Run", "name"], ["Base model"], ["Rank", "figure"], ["Steps", "figure"], ["State"], ["Last activity"], ["Created", "wide"]],
      shown.map((run) => [
        [h("a", { class: "row", href: `#/runs/${run.run_id}` }, nameOf(run) || run.run_id),
          nameOf(run) ? h("small", {}, run.run_id) : null],
        run.base_model,
        run.lora_config ? number(run.lora_config.rank) : "full",
        number(run.step), stateOf(run), when(run.last_request_at), when(run.created_at),
      ]), empty));
  }
  await live(5, async (signal) => {
    runs = await get("v1/runs", signal);
    runs.sort((a, b) => b.last_request_at.localeCompare(a.last_request_at));
    draw();
  });
}

export async function runPage(main, { live, rest: [id] }) {
  main.replaceChildren(h("div", {}, h("p", { class: "quiet" }, "Loading the run.")));
  const path = `v1/runs/${encodeURIComponent(id)}`;
  await live(3, async (signal) => {
    const [run, curves, operations, checkpoints] = await Promise.all([
      get(path, signal), get(`${path}/curves`, signal), get(`${path}/operations`, signal),
      get(`v1/checkpoints?run_id=${encodeURIComponent(id)}`, signal),
    ]);
    morph(main.firstChild, h("div", {}, heading(run), curveSection(curves),
      operationSection(operations), checkpointSection(run, checkpoints)));
    reread(main);
  });
}

function heading(run) {
  const { lora_config: lora, user_metadata: { name, ...metadata } } = run;
  const pairs = [
    ["Base model", run.base_model],
    ["Training", lora ? `LoRA, rank ${lora.rank}, alpha ${number(lora.alpha)}` : "all weights"],
    ["Steps", number(run.step)], ["State", stateOf(run)],
    ["Last activity", when(run.last_request_at)], ["Created", when(run.created_at)],
  ];
  const extra = Object.entries(metadata).map(([field, value]) => [field, typeof value === "string" ? value : JSON.stringify(value)]);
  return h("section", {},
    h("p", { class: "crumb" }, link("#/runs", "Runs")),
    h("h1", {}, nameOf(run) || run.run_id),
    nameOf(run) ? h("p", { class: "quiet" }, h("code", {}, run.run_id)) : null,
    facts([...pairs, ...extra]));
}

function curveSection(curves) {
  const rank = (curve) => {
    const known = FIRST.findIndex((name) => curve.name === name || curve.name.endsWith(`/${name}`));
    return (known < 0 ? FIRST.length : known) * 2 + (curve.source === "logged" ? 0 : 1);
  };
  const ordered = [...curves].sort((a, b) => rank(a) - rank(b)).map(
    (curve) => chart({ ...curve, source: curve.source.replaceAll("_", " ") }));
  const more = ordered.slice(SHOWN);
  const grid = (charts) => h("div", { class: "curves" }, charts);
  return h("section", { "aria-labelledby": "curves" }, h("h2", { id: "curves" }, "Curves"),
    ordered.length
      ? grid(ordered.slice(0, SHOWN))
      : h("p", { class: "quiet" }, "Nothing yet. Losses appear with forward_backward, everything that a program logs with log_metrics."),
    more.length ? h("details", {}, h("summary", {}, `${more.length} more`), grid(more)) : null);
}

function operationSection({ pending, num_pending, ended }) {
  const columns = [["Operation"], ["Seq", "figure"], ["State"], ["Waited", "figure"], ["Ran", "figure"], ["Outcome", "long"]];
  const row = (one) => [
    one.kind.replaceAll("_", " "), one.seq === null ? "" : number(one.seq),
    h("span", { class: `state ${one.state}` }, one.state), span(one.waited_s),
    one.state === "waiting" ? "" : span(one.ran_s),
    one.error ? [one.error.message, one.error.hint ? h("small", {}, one.error.hint) : null] : brief(one.metrics),
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
  return h("section", { "aria-labelledby": "checkpoints" }, h("h2", { id: "checkpoints" }, "Checkpoints"),
    table("Checkpoints",
      [["Name", "name"], ["Holds"], ["Step", "figure"], ["Size", "figure"], ["Time to live"], ["Saved"], ["", "end"]],
      newest.map((one) => [
        h("span", { title: one.path }, one.name), one.kind.replaceAll("_", " "), number(one.step),
        bytes(one.size_bytes), life(one), when(one.created_at),
        link(`#/samples?a=${base}&b=${encodeURIComponent(one.path)}`, "Sample"),
      ]), "None are saved."));
}
