// The playground: one conversation with two models side by side, or with one.
import { choices, picker } from "./models.js";
import { side } from "./chat.js";
import { h } from "./dom.js";

const NONE = ["", [["", "nothing: the left alone"]]];
const FIELDS = [
  ["temperature", "Temperature", 1, { min: 0, step: "any", required: true }],
  ["max_tokens", "Most tokens", 256, { min: 1, required: true }],
  ["seed", "Seed", "", { min: 0, max: Number.MAX_SAFE_INTEGER, placeholder: "any" }],
];

export async function playgroundPage(main, { params, signal }) {
  main.replaceChildren(h("h1", {}, "Playground"), h("p", { class: "quiet" }, "Loading models and checkpoints."));
  const { groups, ...first } = await choices(signal);
  const value = (name, other) => params.get(name) ?? other;
  const settings = settingsForm(groups, first, value);
  const prompt = h("textarea", { name: "prompt", rows: 3, required: true, "aria-label": "Message", spellcheck: "false" });
  const send = h("button", { class: "primary" }, "Send");
  const stop = h("button", { type: "button", hidden: true, click: () => running?.abort() }, "Stop");
  const anew = h("button", { type: "button", click: () => { running?.abort(); sides.forEach((one) => one.clear()); prompt.focus(); } }, "Begin anew");
  const composer = h("form", { class: "composer" }, prompt, h("div", { class: "fields" }, anew, stop, send));
  const field = (name) => settings.elements[name];
  const sides = ["Left", "Right"].map((title) => side(title, () => { field("mode").value = "plain"; modeChanged(); }));
  let running = null;
  signal.addEventListener("abort", () => running?.abort());

  const keep = () => history.replaceState(null, "", `#/playground?${new URLSearchParams(new FormData(settings))}`);
  function choose(name) {
    const [select, one] = [field(name), sides["ab".indexOf(name)]];
    one.node.hidden = !select.value;
    talk.classList.toggle("alone", !field("b").value);
    if (select.value) one.choose(select.value, select.selectedOptions[0].text, field("mode").value);
  }
  function modeChanged() {
    running?.abort();
    const chat = field("mode").value === "chat";
    field("system").closest("label").hidden = !chat;
    prompt.placeholder = chat ? "A message. Ctrl Enter sends it." : "A text to go on with; each stands alone. Ctrl Enter sends it.";
    ["a", "b"].forEach(choose);
    keep();
  }
  const talk = h("div", { class: "pair talk" }, sides.map(({ node }) => node));
  settings.addEventListener("change", ({ target }) => {
    if (target.name === "mode") return modeChanged();
    if (target.name === "a" || target.name === "b") { running?.abort(); choose(target.name); }
    keep();
  });
  settings.addEventListener("submit", (event) => { event.preventDefault(); composer.requestSubmit(); });
  composer.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) composer.requestSubmit();
  });
  composer.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running || !settings.reportValidity()) return;
    const mine = (running = new AbortController());
    const given = Object.fromEntries(new FormData(settings));
    const text = prompt.value;
    [prompt.value, send.disabled, stop.hidden] = ["", true, false];
    await Promise.all(sides.filter(({ node }) => !node.hidden).map((one) => one.send(text, given, mine.signal)));
    [running, send.disabled, stop.hidden] = [null, false, true];
    if (document.activeElement === document.body) prompt.focus();
  });
  main.replaceChildren(h("h1", {}, "Playground"),
    h("p", { class: "quiet" }, "One conversation with two models, each of which goes on from its own replies. Nothing of it is kept."),
    settings, talk, composer);
  modeChanged();
}

function settingsForm(groups, first, value) {
  const modes = [["chat", "Chat"], ["plain", "Plain completion"]];
  return h("form", { class: "sampling" },
    h("div", { class: "pair" }, picker("a", "Left", groups, value("a", first.a)),
      picker("b", "Right", [NONE, ...groups], value("b", first.b === first.a ? "" : first.b))),
    h("label", {}, "System prompt", h("textarea", { name: "system", rows: 2, spellcheck: "false" }, value("system", ""))),
    h("div", { class: "fields" },
      h("label", {}, "As", h("select", { name: "mode" }, modes.map(([mode, text]) =>
        h("option", { value: mode, selected: mode === value("mode", "chat") }, text)))),
      FIELDS.map(([name, label, initial, limits]) => h("label", {}, label,
        h("input", { name, type: "number", value: value(name, initial), ...limits })))));
}
