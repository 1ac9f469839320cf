// What can be done to a run and its checkpoints: a button each, and a dialog that asks before it is done.
import { change } from "./api.js";
import { bytes, h, number } from "./dom.js";

const DAY = 86400;
const LIVES = [["", "for ever"], [3600, "for 1 hour"], [DAY, "for 1 day"], [7 * DAY, "for 7 days"], [30 * DAY, "for 30 days"], [90 * DAY, "for 90 days"]];

/** A button that `operate` hears of; with a reason, it only says why it does nothing. */
export const opener = (act, words, { path = false, label = false, reason = "" } = {}) => h("button", {
  type: "button", class: "act", "data-act": act, "data-path": path, "aria-label": label,
  "aria-disabled": reason ? "true" : false, title: reason || false,
}, words);

const runPath = ({ run }) => `v1/runs/${encodeURIComponent(run.run_id)}`;
const query = ({ one }, more = {}) => new URLSearchParams({ path: one.path, ...more });
const nameOf = ({ run, one }) => (one ? one.name : run.name || run.run_id);
const field = (label, node) => h("label", {}, label, node);
const check = (name, label) => h("label", { class: "check" }, h("input", { type: "checkbox", name }), label);

/** Of each act what the dialog says and asks for, and `send`, which does it and answers what was done. */
const ACTS = {
  rename: {
    title: "Rename the run", verb: "Rename", text: () => "A name that another run of the project has gets a number.",
    fields: ({ run }) => [field("Name", h("input", { name: "name", required: true, maxlength: 128, value: run.name ?? "", autocomplete: "off", spellcheck: "false" }))],
    send: async (at, given) => `It is called ${(await change("PATCH", runPath(at), { name: given.name })).name} now.`,
  },
  stop: {
    title: "Stop the run", verb: "Stop it", harm: true,
    text: () => "What waits for it is cancelled, what has begun ends, and its memory is freed. Its next operation brings it back as it stands then.",
    send: async (at) => `It is stopped at step ${number((await change("POST", `${runPath(at)}/stop`)).step)}.`,
  },
  delete: {
    title: "Delete the run", verb: "Delete it", harm: true,
    text: () => "The run, its curves and its operations are forgotten for good. Its checkpoints stay, unless you tick them.",
    fields: ({ checkpoints }) => (checkpoints.length
      ? [check("checkpoints", `Delete its ${checkpoints.length === 1 ? "checkpoint" : `${number(checkpoints.length)} checkpoints`}, too (${bytes(checkpoints.reduce((sum, one) => sum + one.size_bytes, 0))})`)] : []),
    send: async (at, given) => {
      await change("DELETE", `${runPath(at)}?checkpoints=${Boolean(given.checkpoints)}`);
      location.hash = "#/runs";
    },
  },
  drop: {
    title: "Delete the checkpoint", verb: "Delete it", harm: true,
    text: ({ one }) => `${one.path} (${bytes(one.size_bytes)}) is deleted for good.`,
    send: async (at) => {
      await change("DELETE", `v1/checkpoints?${query(at)}`);
      return `${nameOf(at)} is deleted.`;
    },
  },
  keep: {
    title: "Lifetime of the checkpoint", verb: "Set it", text: () => "Counted from now; then it is deleted for good.",
    fields: ({ one }) => [field("Keep it", h("select", { name: "life" }, LIVES.map(
      ([life, words]) => h("option", { value: life, selected: life === (one.expires_at ? DAY : "") }, words))))],
    send: async (at, given) => {
      await change("PUT", `v1/checkpoints/ttl?${query(at)}`, { ttl_seconds: Number(given.life) || null });
      return `${nameOf(at)} is kept ${LIVES.find(([life]) => `${life}` === given.life)[1]}.`;
    },
  },
  export: {
    title: "Export the checkpoint", verb: "Download", text: () => "A tar archive of what other programs read.",
    fields: ({ one }) => (one.training_mode === "lora" ? [field("As", h("select", { name: "merge" },
      h("option", { value: "" }, "adapter, as PEFT reads it"),
      h("option", { value: "true" }, "whole model, merged from the base and the adapter")))] : []),
    send: async (at, given) => {
      const { url, size_bytes } = await change("POST", `v1/checkpoints/archive?${query(at, given.merge ? { merge: true } : {})}`);
      h("a", { href: url, download: "" }).click();
      return `${nameOf(at)} is being downloaded, ${bytes(size_bytes)}.`;
    },
  },
};

/** Hears the openers below `page`; `known` is what it shows, `look` reads that again. */
export function operate(page, { known, notice, look }) {
  const say = (words) => { notice.textContent = words; };
  page.addEventListener("click", async ({ target }) => {
    const button = target.closest?.("[data-act]");
    if (!button) return;
    const { act, path } = button.dataset;
    const at = { ...known, one: known.checkpoints.find((one) => one.path === path) };
    if (button.getAttribute("aria-disabled")) say(button.title);
    else if (act === "copy") await copy(path, say);
    else ask(ACTS[act], at, async (words) => {
      if (!words) return;
      say(words);
      await look().catch(() => {}); // the page goes on looking, and tells what is wrong
      if (!button.isConnected) document.getElementById("main").focus();
    });
  });
}

/** Where a page may not write to the clipboard, as over plain HTTP, the path is shown to be copied. */
async function copy(path, say) {
  try {
    await navigator.clipboard.writeText(path);
    say(`${path} is copied.`);
  } catch {
    ask({
      title: "Copy the path", text: () => "This browser lets a page write to the clipboard over HTTPS alone.",
      fields: () => [field("Path", h("input", { readonly: true, value: path, focus: ({ target }) => target.select() }))],
    }, {}, () => {});
  }
}

/** Opens a dialog; `done` hears what was done, after the server has said that it was. */
function ask({ title, text, verb, harm, fields = () => [], send }, at, done) {
  const problem = h("div", { role: "alert" });
  const go = verb ? h("button", { class: harm ? "harm" : "primary" }, verb) : null;
  const back = h("button", { type: "button", click: () => dialog.close() }, verb ? "Cancel" : "Close");
  const form = h("form", { submit: answer }, h("h2", { id: "ask" }, title),
    at.run ? h("p", {}, h("strong", {}, nameOf(at))) : null, h("p", { id: "ask-text" }, text(at)), fields(at), problem,
    h("p", { class: "acts" }, back, go));
  const dialog = h("dialog", { class: "ask", "aria-labelledby": "ask", "aria-describedby": "ask-text", close: () => dialog.remove() }, form);
  async function answer(event) {
    event.preventDefault();
    if (!go || go.disabled) return;
    go.disabled = true;
    problem.replaceChildren();
    try {
      const words = await send(at, Object.fromEntries(new FormData(form)));
      dialog.close();
      await done(words);
    } catch (error) {
      problem.replaceChildren(h("p", { class: "problem" }, error.message), error.hint ? h("p", { class: "quiet" }, error.hint) : "");
    }
    go.disabled = false;
  }
  document.body.append(dialog);
  dialog.showModal();
  (form.querySelector("input:not([type=checkbox]), select") ?? back).focus();
}
