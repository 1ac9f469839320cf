// Samples of two checkpoints side by side: same prompt, same seed.
import { sample } from "./api.js";
import { h, number } from "./dom.js";
import { choices, picker } from "./models.js";

const FIELDS = [
  ["temperature", "Temperature", 1, { min: 0, step: "any" }],
  ["top_p", "Top-p", 1, { min: 0, max: 1, step: "any" }],
  ["max_tokens", "Tokens", 64, { min: 1, max: 2048 }],
  ["seed", "Seed", 0, { min: 0, max: Number.MAX_SAFE_INTEGER }],
  ["num_samples", "Samples", 2, { min: 1, max: 8 }],
];

export async function samplesPage(main, { params, signal, fail }) {
  main.replaceChildren(h("h1", {}, "Samples"), h("p", { class: "quiet" }, "Loading models and checkpoints."));
  const { groups, ...first } = await choices(signal);
  const value = (name, other) => params.get(name) ?? other;
  const select = (name, label) => picker(name, label, groups, value(name, first[name]));
  const form = h("form", { class: "sampling" },
    h("div", { class: "pair" }, select("a", "Left"), select("b", "Right")),
    h("label", {}, "Prompt", h("textarea", { name: "prompt", rows: 3, required: true, spellcheck: "false" }, value("prompt", ""))),
    h("div", { class: "fields" },
      FIELDS.map(([name, label, initial, limits]) => h("label", {}, label,
        h("input", { name, type: "number", required: true, value: value(name, initial), ...limits }))),
      h("label", { class: "check" }, h("input", { type: "checkbox", name: "chat", checked: params.has("chat") }), "As a chat message"),
      h("button", { class: "primary" }, "Sample")));
  const results = h("div", { class: "pair", "aria-live": "off" });
  main.replaceChildren(h("h1", {}, "Samples"),
    h("p", { class: "quiet" }, "The same prompt and seed on both sides. The stronger a token is shaded, the less likely it was."), form, results);
  let running = null;
  signal.addEventListener("abort", () => running?.abort());
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    running?.abort();
    const mine = (running = new AbortController());
    const given = Object.fromEntries(new FormData(form));
    history.replaceState(null, "", `#/samples?${new URLSearchParams(given)}`);
    const sides = ["a", "b"].map((side) => column(form.elements[side].selectedOptions[0].text));
    results.replaceChildren(...sides.map(({ node }) => node));
    const handlers = {
      signal: mine.signal,
      piece: (i, delta) => sides[i].add(delta),
      failed: (i, error) => sides[i].fail(error),
    };
    try {
      await sample([given.a, given.b].map((path) => operation(path, given)), handlers);
      sides.forEach((side) => side.end());
    } catch (error) {
      if (mine.signal.aborted) return;
      if (error.status === 401) fail(error);
      sides.forEach((side) => side.fail(error));
    }
  });
}

function operation(path, given) {
  const prompt = given.chat ? [{ role: "user", content: given.prompt }] : given.prompt;
  const params = Object.fromEntries(["temperature", "top_p", "max_tokens", "seed"].map((name) => [name, Number(given[name])]));
  return { kind: "sample", sampler_id: path, prompt, params, num_samples: Number(given.num_samples), stream: true };
}

/** One side's samples, which grow as pieces come. */
function column(title) {
  const list = h("div", {}, h("p", { class: "quiet" }, "Sampling."));
  const status = h("p", { class: "summary", role: "status" });
  const rows = [];
  const all = [];
  function row(index) {
    if (!rows.length) list.replaceChildren();
    for (let i = rows.length; i <= index; i++) {
      const text = h("p", { class: "tokens", dir: "auto" });
      const note = h("small", {});
      const fold = folded(text);
      rows.push({ text, note, fold, held: [], logprobs: [] });
      const label = `Sample ${i + 1}. Arrow keys read its tokens.`;
      const article = h("article", { "aria-label": label, tabindex: 0 }, text, fold.button, note);
      readable(article, text, note);
      list.append(article);
    }
    return rows[index];
  }
  return {
    node: h("section", {}, h("h2", {}, title), status, list),
    add({ index, text, logprobs, stop_reason }) {
      const at = row(index);
      at.held.push(...logprobs);
      at.logprobs.push(...logprobs);
      all.push(...logprobs);
      if (text) at.text.append(token(text, at.held.splice(0)));
      at.fold.grown();
      if (!stop_reason) return;
      if (at.held.length) at.text.append(token("", at.held.splice(0)));
      at.note.textContent = `${at.logprobs.length} tokens, log-probability ${number(sum(at.logprobs))}, ended by ${stop_reason}`;
    },
    end() {
      if (all.length) status.textContent = `Mean log-probability ${number(sum(all) / all.length)} a token, over ${number(all.length)} tokens.`;
    },
    fail(error) {
      const words = [error.message, error.hint].filter(Boolean).join(" ");
      list.replaceChildren(h("p", { class: "problem", role: "alert" }, words));
    },
  };
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

/** A long sample shows its first lines, and the rest by a button. */
function folded(text) {
  const button = h("button", { type: "button", class: "fold", hidden: true, "aria-expanded": "false", click: toggle }, "Show all");
  text.classList.add("folded");
  function toggle() {
    const open = !text.classList.toggle("folded");
    button.setAttribute("aria-expanded", `${open}`);
    button.textContent = open ? "Show less" : "Show all";
  }
  const grown = () => { if (button.hidden) button.hidden = text.scrollHeight <= text.clientHeight + 1; };
  return { button, grown };
}

/** A piece of text, shaded by how unlikely its tokens were; without text, the end of the sample. */
function token(text, logprobs) {
  const mean = sum(logprobs) / logprobs.length;
  const chance = number(100 * Math.exp(mean));
  const node = h("span", { class: text ? "token" : "token stop", "data-reading": `${number(mean)} nats, ${chance} %` }, text || "end");
  node.style.setProperty("--surprise", `${Math.round(Math.min(1, -mean / 6) * 75)}%`);
  return node;
}

/** Shows in `note` what the token under the pointer, or chosen with the arrow keys, is worth. */
function readable(article, text, note) {
  let [usual, at] = ["", null];
  function read(token) {
    if (at === null) usual = note.textContent;
    at?.classList.remove("at");
    token?.classList.add("at");
    at = token;
    note.textContent = token ? `“${token.textContent}” ${token.dataset.reading}` : usual;
  }
  article.addEventListener("pointermove", ({ target }) => { if (target.matches(".token") && target !== at) read(target); });
  article.addEventListener("pointerleave", () => at && read(null));
  article.addEventListener("blur", () => at && read(null));
  article.addEventListener("keydown", (event) => {
    const next = { ArrowRight: at ? at.nextSibling : text.firstChild, ArrowLeft: at?.previousSibling }[event.key];
    if (!next) return;
    event.preventDefault();
    read(next);
    if (text.classList.contains("folded") && next.offsetTop + next.offsetHeight > text.offsetTop + text.clientHeight) {
      article.querySelector(".fold").click();
    }
  });
}
