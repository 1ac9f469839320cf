// The list of runs: found, a hundred at a time, and chosen to lay their curves over each other.
import { get } from "./api.js";
import { h, link, morph, number, table, when } from "./dom.js";
import { MOST_RUNS, stateOf } from "./run.js";

const PAGE = 100;

export async function runsPage(main, { live, params, caller, signal }) {
  const chosen = new Set((params.get("with") ?? "").split(",").filter(Boolean));
  const filter = h("input", {
    id: "filter", type: "search", placeholder: "Filter", value: params.get("find") ?? "",
    "aria-label": "Filter the runs by name, id, model or project", input: () => turn(0),
  });
  const list = h("div", { change: choose }, h("p", { class: "quiet" }, "Loading the runs."));
  const foot = h("div", { class: "foot" });
  main.replaceChildren(h("div", { class: "head" }, h("h1", {}, "Runs"), filter), list, foot);
  let [now, page, asked] = [null, Math.max(0, (Number(params.get("page")) || 1) - 1), 0];

  function keep() {
    const kept = { find: filter.value.trim(), page: page ? page + 1 : "", with: [...chosen].join() };
    const query = new URLSearchParams(Object.entries(kept).filter(([, value]) => value));
    history.replaceState(null, "", `#/runs${query.size ? `?${query}` : ""}`);
  }
  function turn(to) {
    page = to;
    keep();
    return look().catch(() => {}); // the page goes on looking, and tells what is wrong
  }
  function choose({ target }) {
    if (target.checked) chosen.add(target.value);
    else chosen.delete(target.value);
    keep();
    draw();
  }
  async function look() {
    const mine = ++asked;
    const query = new URLSearchParams({ find: filter.value.trim(), offset: PAGE * page, limit: PAGE });
    const answer = await get(`v1/overview?${query}`, signal);
    if (mine !== asked) return; // another question was asked meanwhile
    if (page && !answer.runs.length) return turn(0);
    now = answer;
    draw();
  }
  function draw() {
    const { runs, total } = now;
    const empty = filter.value.trim()
      ? "No run has this in its name, id, model or project."
      : "There are no runs yet. A program makes one with create_model; it then appears here.";
    morph(list.firstChild, table("Runs", columns(caller), runs.map((run) => row(run, chosen, caller)), empty));
    morph(foot, h("div", { class: "foot" }, pager(total, page), compare(chosen)));
  }
  foot.addEventListener("click", ({ target }) => {
    const step = Number(target.dataset?.step);
    if (step && target.getAttribute("aria-disabled") !== "true") turn(page + step);
  });
  await live(5, look);
}

const columns = (caller) => [["Run", "name"], ...(caller.admin ? [["Project"]] : []), ["Base model"], ["Steps", "figure"],
  ["Reward or loss", "figure"], ["Tokens/s", "figure"], ["State"], ["Last activity"], ["Compare"]];

function row(run, chosen, caller) {
  const { run_id: id, telling } = run;
  return [
    [h("a", { class: "row", href: `#/runs/${encodeURIComponent(id)}` }, run.name || id), run.name ? h("small", {}, id) : null],
    ...(caller.admin ? [run.project] : []),
    run.base_model, number(run.step),
    telling ? [number(telling.value), h("small", {}, telling.name)] : "",
    run.tokens_per_s === null ? "" : number(Number(run.tokens_per_s.toPrecision(3))),
    stateOf(run), when(run.last_request_at),
    h("input", { type: "checkbox", value: id, checked: chosen.has(id), "aria-label": `Compare ${run.name || id}` }),
  ];
}

function pager(count, page) {
  const last = Math.ceil(count / PAGE) - 1;
  const button = (step, words, possible) => h("button", { type: "button", "data-step": step, "aria-disabled": !possible && "true" }, words);
  if (last < 1) return h("p", { class: "quiet" }, count ? `${number(count)} ${count === 1 ? "run" : "runs"}` : "");
  return h("nav", { "aria-label": "Pages of the list" },
    button(-1, "Previous", page > 0),
    h("span", {}, `${number(PAGE * page + 1)} to ${number(Math.min(count, PAGE * (page + 1)))} of ${number(count)}`),
    button(1, "Next", page < last));
}

function compare(chosen) {
  const [first, ...others] = chosen;
  if (!others.length) return h("p", { class: "quiet" }, first ? "Tick one more run to compare the two." : "Tick two runs to compare their curves.");
  if (chosen.size > MOST_RUNS) return h("p", { class: "quiet" }, `At most ${MOST_RUNS} runs can be compared; ${chosen.size} are ticked.`);
  return h("p", {}, link(`#/runs/${encodeURIComponent(first)}?${new URLSearchParams({ with: others.join() })}`, `Compare ${chosen.size} runs`));
}
