// How busy the server is, who keeps it so, and what its machine has left; for administrators.
import { get } from "./api.js";
import { chart, reread } from "./chart.js";
import { clusterSection } from "./cluster.js";
import { bytes, facts, h, morph, number, span, table } from "./dom.js";

const KEPT = 600;

export async function loadPage(main, { live }) {
  main.replaceChildren(h("div", {}, h("p", { class: "quiet" }, "Loading.")));
  const history = [];
  await live(2, async (signal) => {
    const [now, cluster] = await Promise.all(["v1/load", "v1/cluster"].map((path) => get(path, signal)));
    history.push(now);
    if (history.length > KEPT) history.shift();
    morph(main.firstChild, h("div", {},
      h("h1", {}, "Load"), h("p", { class: "lead" }, summary(now)), h("div", { class: "curves" }, curves(history, now)),
      machineSection(now.machine), tenantSection(now.tenants), clusterSection(cluster)));
    reread(main);
  });
}

function summary(now) {
  const wait = now.waiting ? `; the longest has waited ${span(now.longest_wait_s)}` : "";
  const share = now.prompt_tokens ? 100 * now.reused_prompt_tokens / now.prompt_tokens : 0;
  const reused = share ? ` ${share.toFixed(0)} % of the tokens of prompts were there already.` : "";
  return `${number(now.running)} running, ${number(now.waiting)} waiting${wait}.${reused}`;
}

function curves(history, now) {
  const axis = (at) => { const past = now.at - history[0].at - at; return past < 1 ? "now" : `${span(past)} ago`; };
  const rate = (field) => history.slice(1).map((one, i) => [
    one.at - history[0].at, Math.max(0, one[field] - history[i][field]) / (one.at - history[i].at),
  ]);
  const curve = (name, source, points) => points.length
    ? chart({ name, source, points, last: points.at(-1)[1] }, { axis, zero: true }) : null;
  return [curve("Waiting", "operations", history.map((one) => [one.at - history[0].at, one.waiting])),
    curve("Trained tokens", "per second", rate("trained_tokens")),
    curve("Sampled tokens", "per second", rate("sampled_tokens"))];
}

function machineSection(machine) {
  const { device, version, uptime_s, process_bytes, memory_bytes, memory_free_bytes } = machine;
  const { device_bytes, device_free_bytes, disk_bytes, disk_free_bytes, home_bytes } = machine;
  const free = (left, whole) => `${bytes(left)} free of ${bytes(whole)}`;
  return h("section", { "aria-labelledby": "machine" }, h("h2", { id: "machine" }, "Machine"), facts([
    ["Computes with", device], ["Version", version], ["Up for", span(uptime_s)],
    process_bytes === null ? null : ["Memory of the server", bytes(process_bytes)],
    memory_bytes === null ? null : ["Memory", free(memory_free_bytes, memory_bytes)],
    device_bytes === null ? null : ["Memory of the device", free(device_free_bytes, device_bytes)],
    ["Disk", free(disk_free_bytes, disk_bytes)], ["The home takes", bytes(home_bytes)],
  ].filter(Boolean)));
}

function tenantSection(tenants) {
  const columns = [["Project", "name"], ["Runs", "figure"], ["Active", "figure"], ["Running", "figure"],
    ["Waiting", "figure"], ["Longest wait", "figure"], ["Stored", "figure"]];
  const rows = tenants.map((one) => [one.project, number(one.runs), number(one.active_runs), number(one.running),
    number(one.waiting), one.waiting ? span(one.longest_wait_s) : "", bytes(one.stored_bytes)]);
  return h("section", { "aria-labelledby": "tenants" }, h("h2", { id: "tenants" }, "Tenants"),
    table("Tenants", columns, rows, "No project has a key or a run."));
}
