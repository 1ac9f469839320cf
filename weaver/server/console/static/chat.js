// One side of the playground: a conversation with one model, streamed by OpenAI's routes.
import { ApiError, ask, events } from "./api.js";
import { h, number, span } from "./dom.js";

const JSON_TYPE = { method: "POST", type: "application/json" };

/** What the server calls the choice of a picker. */
const modelOf = (id) => id.replace(/^base:/, "");

/** Why a model cannot chat, in words; null where it can. */
export async function lackOfChat(id, signal) {
  const body = JSON.stringify({ model: modelOf(id), messages: [{ role: "user", content: "a" }] });
  try {
    await ask("v1/tokenize", { ...JSON_TYPE, body, signal });
    return null;
  } catch (error) {
    if (error.status !== 422) throw error;
    return error.message;
  }
}

/** Deltas of one reply, `{ text, reason, tokens }`; aborting it cancels the sample on the server. */
async function* replies(id, given, messages, signal) {
  const { mode, system, max_tokens, temperature, seed } = given;
  const params = { model: modelOf(id), max_tokens: Number(max_tokens), temperature: Number(temperature),
    ...(seed === "" ? {} : { seed: Number(seed) }), stream: true, stream_options: { include_usage: true } };
  const chat = mode === "chat";
  const turns = system ? [{ role: "system", content: system }, ...messages] : messages;
  const asked = chat ? { messages: turns } : { prompt: messages.at(-1).content };
  const body = JSON.stringify({ ...params, ...asked });
  const path = chat ? "v1/chat/completions" : "v1/completions";
  for await (const { data } of events(path, { ...JSON_TYPE, body, signal })) {
    if (data === "[DONE]") return;
    const { error, choices: [choice] = [], usage } = JSON.parse(data ?? "{}");
    if (error) throw new ApiError(error.message);
    yield { text: choice?.delta?.content ?? choice?.text ?? "", reason: choice?.finish_reason, tokens: usage?.completion_tokens };
  }
  throw new ApiError("The stream broke off.", { hint: "Send it again." });
}

/** `plain` is called where the model cannot chat and is asked to complete text instead. */
export function side(title, plain) {
  const turns = h("div", { class: "turns" });
  const status = h("p", { class: "summary", role: "status" });
  const heading = h("h2", {}, title);
  let messages = [];
  let [id, checked] = ["", new AbortController()];
  const bubble = (who) => {
    const text = h("p", { class: "said", dir: "auto" });
    const node = h("article", { class: who === "You" ? "mine" : "", "aria-label": who, tabindex: 0 },
      h("small", {}, who), text);
    turns.append(node);
    node.scrollIntoView({ block: "nearest" });
    return { node, text };
  };
  const say = (words) => { status.textContent = words; };
  return {
    node: h("section", { "aria-label": title }, heading, status, turns),
    clear() { messages = []; turns.replaceChildren(); say(""); },
    async choose(path, name, mode) {
      checked.abort();
      checked = new AbortController();
      [id, heading.textContent] = [path, name];
      this.clear();
      if (mode !== "chat") return;
      const { signal } = checked;
      const lack = await lackOfChat(path, signal).catch((error) => (signal.aborted ? null : error.message));
      if (lack && !signal.aborted) turns.replaceChildren(h("div", { class: "hint" }, h("p", {}, `It cannot chat: ${lack}`),
        h("button", { type: "button", click: plain }, "Complete plain text instead")));
    },
    async send(text, given, signal) {
      turns.querySelector(".hint")?.remove();
      bubble("You").text.textContent = text;
      const asked = [...messages, { role: "user", content: text }];
      const { node, text: reply } = bubble("Model");
      const began = performance.now();
      say("Waiting for the first token.");
      let [tokens, reason] = [0, null];
      const ended = (how) => {
        if (reply.textContent) messages = [...asked, { role: "assistant", content: reply.textContent }];
        say(how);
      };
      try {
        for await (const delta of replies(id, given, asked, signal)) {
          if (delta.text) { reply.append(delta.text); say("Writing."); }
          reason = delta.reason ?? reason;
          tokens = delta.tokens ?? tokens;
        }
        const passed = (performance.now() - began) / 1000;
        ended(`${number(tokens)} tokens in ${span(passed)}, ${number(Math.round(tokens / passed))} a second; ended by ${reason}.`);
      } catch (error) {
        if (signal.aborted) return ended("Stopped.");
        ended("");
        node.append(h("p", { class: "problem", role: "alert" }, [error.message, error.hint].filter(Boolean).join(" ")));
      }
    },
  };
}
