// What a server has in other processes, and what waits there for what; a part of the load page.
import { bytes, h, number, span, table } from "./dom.js";

/** `cluster`: the answer of /v1/cluster. Nothing, of a server of one process. */
export function clusterSection(cluster) {
  const { at, ray, groups, pools, samplers, lanes } = cluster;
  if (!ray && !groups.length && !pools.length && !samplers.length) return null;
  const part = (title, columns, rows) => (rows.length ? [h("h3", {}, title), table(title, columns, rows)] : null);
  return h("section", { "aria-labelledby": "cluster" }, h("h2", { id: "cluster" }, "Cluster"),
    ray ? h("p", { class: "quiet" }, ray) : null,
    part("Groups", [["Group", "name"], ["Model"], ["Ranks", "figure"], ["State"], ["Runs", "figure"], ["Starts", "figure"]],
      groups.map((one) => [named(one), one.model, `${one.ranks.length} of ${one.ranks_wanted}`, state(one, at),
        number(one.runs), number(one.starts)])),
    part("Ranks", [["Rank", "name"], ["Host"], ["Process", "figure"], ["Device"], ["Memory", "figure"]],
      groups.flatMap((group) => group.ranks.map((rank, i) =>
        [`${group.name}, rank ${i}`, rank.host, `${rank.pid}`, rank.device, bytes(rank.memory_bytes)]))),
    part("Waiting for groups", [["Group", "name"], ["Runs", "figure"], ["Running", "figure"], ["Waiting", "figure"], ["Longest wait", "figure"]],
      lanes.map((one) => [one.lane || "the server's own process", number(one.runs), number(one.running), number(one.waiting),
        one.waiting ? span(one.longest_wait_s) : ""])),
    part("Waiting for samplers", [["Model", "name"], ["Samplers", "figure"], ["Free rows", "figure"], ["Waiting", "figure"]],
      pools.map((one) => [one.model, number(one.workers), `${one.free_rows} of ${one.rows}`, number(one.waiting)])),
    part("Samplers", [["Sampler", "name"], ["Model"], ["State"], ["Process"], ["Rows", "figure"], ["Memory", "figure"], ["Starts", "figure"]],
      samplers.map((one) => [named(one), one.model, state(one, at), one.pid ? `${one.pid} on ${one.host ?? "this machine"}` : "",
        number(one.rows), bytes(one.memory_bytes), number(one.starts)])));
}

const named = ({ name, waits_for, last_loss }) => [name,
  waits_for ? h("small", {}, `waits for ${waits_for}`) : null,
  last_loss ? h("small", {}, `last lost: ${last_loss}`) : null];

const DOTS = { ready: "active", running: "active", waiting: "waiting", starting: "waiting" };

const state = (one, at) => h("span", { class: `state ${DOTS[one.state] ?? ""}` },
  `${one.state}, ${span(Math.max(0, at - one.since))}`);
