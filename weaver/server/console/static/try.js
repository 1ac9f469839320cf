// A form that sends a route's request, and what was answered; a part of the API page.
import { key, raw } from "./api.js";
import { confirmed } from "./confirm.js";
import { bytes, h, link } from "./dom.js";
import { example } from "./example.js";

const JSON_TYPE = "application/json";
const SHOWN = 20_000;

/** Why a route cannot be tried here; null where it can. */
function lack({ requestBody, responses }) {
  const asked = Object.keys(requestBody?.content ?? {});
  const answered = Object.entries(responses).filter(([status]) => status[0] === "2").flatMap(([, { content }]) => Object.keys(content ?? {}));
  if (asked.length && !asked.includes(JSON_TYPE)) return `It takes ${asked[0]}, binary data that cannot be typed here.`;
  if (answered.length && !answered.includes(JSON_TYPE)) {
    return answered[0] === "text/event-stream" ? "It answers a stream of events." : `It answers ${answered[0]}, binary data that cannot be shown here.`;
  }
  return null;
}

export function tryForm(path, method, operation, schemas) {
  const reason = lack(operation);
  if (reason) return h("p", { class: "quiet" }, `${reason} It cannot be tried on this page.`);
  const parameters = (operation.parameters ?? []).filter((one) => one.in === "path" || one.in === "query");
  const schema = operation.requestBody?.content[JSON_TYPE].schema;
  const input = (one) => h("label", {}, one.name, h("input", {
    name: `${one.in}:${one.name}`, required: one.required ?? false, value: one.schema?.default ?? "", autocomplete: "off", spellcheck: "false" }));
  const begun = schema ? JSON.stringify(example(schema, schemas), null, 2) : "";
  const rows = Math.min(16, begun.split("\n").length + 1);
  const body = schema ? h("textarea", { name: "body", rows, spellcheck: "false" }, begun) : null;
  const answer = h("div", { class: "answer", role: "status" });
  const form = h("form", { class: "try", "aria-label": `Try ${method.toUpperCase()} ${path}`, submit },
    parameters.length ? h("div", { class: "fields" }, parameters.map(input)) : null,
    body ? h("label", {}, "Body", body) : null,
    h("p", {}, h("button", { class: method === "get" ? "primary" : "" }, method === "get" ? "Send" : "Send …")), answer);
  async function submit(event) {
    event.preventDefault();
    const problem = body && unreadable(body.value);
    if (problem) return answer.replaceChildren(h("p", { class: "problem" }, problem));
    const address = addressOf(path, parameters, new FormData(form));
    const line = `${method.toUpperCase()} /${address}`;
    const sure = method === "get" || await confirmed("Send this?", `${line} changes what is on the server.`, "Send");
    if (sure) answer.replaceChildren(...await send(address, method, body?.value));
  }
  return form;
}

function unreadable(text) {
  try {
    JSON.parse(text);
    return null;
  } catch (error) {
    return `The body is not JSON: ${error.message}`;
  }
}

/** Relative to the page, so that a proxy's prefix stays. */
function addressOf(path, parameters, given) {
  const filled = path.slice(1).replace(/\{([^}:]+)(:path)?\}/g, (_, name) => encodeURIComponent(given.get(`path:${name}`)));
  const query = new URLSearchParams();
  for (const { name } of parameters.filter((one) => one.in === "query")) {
    const value = given.get(`query:${name}`);
    if (value) query.append(name, value);
  }
  return `${filled}${query.size ? `?${query}` : ""}`;
}

async function send(address, method, body) {
  const began = performance.now();
  try {
    const reply = await raw(address, { method: method.toUpperCase(), body });
    const text = await reply.text();
    const took = `${Math.round(performance.now() - began)} ms`;
    const size = new TextEncoder().encode(text).length;
    const words = `${reply.status} ${reply.statusText}`.trim();
    return [h("p", { class: reply.ok ? "" : "problem" }, `${words}, ${took}, ${bytes(size)}`),
      text ? h("pre", { tabindex: 0, role: "group", "aria-label": "The answer" }, pretty(text)) : null,
      reply.status === 401 ? h("p", {}, key.get() ? "This tab's key was refused. " : "This tab has no key. ", link("./", "Enter one in the console"), ".") : null,
    ].filter(Boolean);
  } catch (error) {
    return [h("p", { class: "problem" }, error.message)];
  }
}

function pretty(text) {
  let shown = text;
  try {
    shown = JSON.stringify(JSON.parse(text), null, 2);
  } catch { /* it is not JSON: as it came */ }
  return shown.length > SHOWN ? `${shown.slice(0, SHOWN)}\n… and ${bytes(shown.length - SHOWN)} more` : shown;
}
