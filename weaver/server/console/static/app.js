// The console: which page the address names, who looks at it, and the keyboard.
import { ApiError, get, key } from "./api.js";
import { listen } from "./chart.js";
import { h } from "./dom.js";
import { loadPage } from "./load.js";
import { playgroundPage } from "./playground.js";
import { runPage } from "./run.js";
import { runsPage } from "./runs.js";
import { samplesPage } from "./samples.js";

const at = (id) => document.getElementById(id);
const main = at("main");
let shown = new AbortController();
let caller = null;

async function open() {
  shown.abort();
  const { signal } = (shown = new AbortController());
  const [path, query = ""] = (location.hash.slice(2) || "runs").split("?");
  const [name, ...rest] = path.split("/").map(decodeURIComponent);
  const page = { runs: rest.length ? runPage : runsPage, samples: samplesPage, playground: playgroundPage, load: loadPage }[name];
  document.title = `${rest[0] ?? (page ? name[0].toUpperCase() + name.slice(1) : "Not found")} · Weaver`;
  for (const link of at("nav").children) {
    if (link.getAttribute("href") === `#/${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  at("status").textContent = "";
  try {
    caller ??= await get("v1/caller", signal);
    identify();
    if (!page) throw new ApiError("There is no such page.");
    const params = new URLSearchParams(query);
    await page(main, { rest, params, signal, fail, caller, live: (every, step) => live(every, step, signal) });
  } catch (error) {
    if (!signal.aborted) fail(error);
  }
}

/** Repeats `step` while the tab is visible, every few seconds and rarer when answers are slow. */
async function live(every_s, step, signal) {
  const ended = new Promise((resolve) => signal.addEventListener("abort", resolve));
  let succeeded = false;
  while (!signal.aborted) {
    const began = performance.now();
    try {
      await step(signal);
      succeeded = true;
      at("status").textContent = "";
    } catch (error) {
      const final = !(error instanceof ApiError) || (error.status >= 400 && error.status < 429);
      if (signal.aborted || final || !succeeded) throw error;
      at("status").textContent = `${error.message} What you see is of an earlier moment; trying again.`;
    }
    await pause(Math.max(1000 * every_s, 20 * (performance.now() - began)), ended);
    while (document.hidden && !signal.aborted) await Promise.race([ended, once(document, "visibilitychange")]);
  }
}

const pause = (milliseconds, ended) => Promise.race([ended, new Promise((resolve) => setTimeout(resolve, milliseconds))]);
const once = (target, name) => new Promise((resolve) => target.addEventListener(name, resolve, { once: true }));

function identify() {
  at("nav").hidden = !caller;
  at("load-link").hidden = !caller?.admin;
  at("leave").hidden = !key.get();
  at("who").textContent = caller ? caller.project + (caller.admin ? ", admin" : "") : "";
}

function fail(error) {
  if (error.status === 401) return askKey(key.get() ? error.message : "");
  if (!(error instanceof ApiError)) console.error(error);
  const again = h("button", { type: "button", click: open }, "Try again");
  main.replaceChildren(h("div", { class: "notice", role: "alert" },
    h("h1", {}, error.status === 404 ? "Not found" : "That did not work"),
    h("p", {}, error.message),
    error.hint && error.status !== 404 ? h("p", { class: "quiet" }, error.hint) : null,
    h("p", {}, again, " ", h("a", { href: "#/runs" }, "Go to the runs"))));
}

function askKey(problem) {
  key.clear();
  caller = null;
  identify();
  const secret = h("input", { id: "key", type: "password", name: "key", required: true, autocomplete: "off", spellcheck: "false" });
  const form = h("form", { class: "notice", submit: enter },
    h("h1", {}, "Weaver"),
    h("label", {}, "API key", secret),
    problem ? h("p", { class: "problem", role: "alert" }, `The key was rejected: ${problem}`) : null,
    h("p", {}, h("button", { class: "primary" }, "Open the console")),
    h("p", { class: "quiet" }, "This tab keeps the key until it is closed. On the server, ",
      h("code", {}, "weaver keys create --project NAME"), " makes one."));
  function enter(event) {
    event.preventDefault();
    const given = secret.value.trim();
    if (!/^[!-~]+$/.test(given)) return askKey("it has characters that no key has.");
    key.set(given);
    open();
  }
  main.replaceChildren(form);
  secret.focus();
}

let before = "";
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, dialog");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const go = before === "g" && { r: "#/runs", s: "#/samples", p: "#/playground", l: caller?.admin && "#/load" }[event.key];
  before = event.key;
  if (go) location.hash = go;
  else if (event.key === "?") at("shortcuts").showModal();
  else if (event.key === "/" && at("filter")) at("filter").focus();
  else if (event.key === "j" || event.key === "k") {
    const rows = [...main.querySelectorAll(".row, .curve, article")].filter((row) => row.checkVisibility());
    const next = rows.indexOf(document.activeElement) + (event.key === "j" ? 1 : -1);
    rows[Math.max(0, Math.min(rows.length - 1, next))]?.focus();
  } else return;
  event.preventDefault();
});
at("help").addEventListener("click", () => at("shortcuts").showModal());
at("leave").addEventListener("click", () => { shown.abort(); askKey(""); });
at("skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
window.addEventListener("hashchange", () => { main.focus({ preventScroll: true }); scrollTo(0, 0); open(); });
listen(main);
open();
