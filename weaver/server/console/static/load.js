// How busy the server is, and who keeps it so; for administrators.
import { get } from "./api.js";
import { chart, reread } from "./chart.js";
import { bytes, h, morph, number, span, table } from "./dom.js";

const KEPT = 600;

export async function loadPage(main, { live }) {
  main.replaceChildren(h("div", {}, h("p", { class: "quiet" }, "Loading.")));
  const history = [];
  await live(2, async (signal) => {
    const now = await get("v1/load", signal);
    history.push(now);
    if (history.length > KEPT) history.shift();
    const axis = (at) => { const past = now.at - history[0].at - at; return past < 1 ? "now" : `${span(past)} ago`; };
    const rate = (field) => history.slice(1).map((one, i) => [
      one.at - history[0].at, Math.max(0, one[field] - history[i][field]) / (one.at - history[i].at),
    ]);
    const curve = (name, source, points) => points.length
      ? chart({ name, source, points, last: points.at(-1)[1] }, { axis, zero: true }) : null;
    const queue = history.map((one) => [one.at - history[0].at, one.waiting]);
    const wait = now.waiting ? `; the longest has waited ${span(now.longest_wait_s)}` : "";
    const share = now.prompt_tokens ? 100 * now.reused_prompt_tokens / now.prompt_tokens : 0;
    const reused = share ? ` ${share.toFixed(0)} % of the tokens of prompts were there already.` : "";
    morph(main.firstChild, h("div", {},
      h("h1", {}, "Load"),
      h("p", { class: "lead" }, `${number(now.running)} running, ${number(now.waiting)} waiting${wait}.${reused}`),
      h("div", { class: "curves" },
        curve("Waiting", "operations", queue),
        curve("Trained tokens", "per second", rate("trained_tokens")),
        curve("Sampled tokens", "per second", rate("sampled_tokens"))),
      h("h2", {}, "Tenants"),
      table("Tenants",
        [["Project", "name"], ["Runs", "figure"], ["Active", "figure"], ["Running", "figure"], ["Waiting", "figure"], ["Stored", "figure"]],
        now.tenants.map((one) => [one.project, number(one.runs), number(one.active_runs),
          number(one.running), number(one.waiting), bytes(one.stored_bytes)]),
        "No project has a key or a run.")));
    reread(main);
  });
}
