// The server's HTTP interface, asked with the key that this tab keeps.

const SLOT = "weaver-api-key";
export const key = {
  get: () => sessionStorage.getItem(SLOT) ?? "",
  set: (secret) => sessionStorage.setItem(SLOT, secret),
  clear: () => sessionStorage.removeItem(SLOT),
};

export class ApiError extends Error {
  constructor(message, { status = 0, hint = null } = {}) {
    super(message);
    this.status = status;
    this.hint = hint;
  }
}

async function ask(path, { method = "GET", body, type = "application/json", signal, keepalive } = {}) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  if (body) headers["Content-Type"] = type;
  let reply;
  try {
    reply = await fetch(path, { method, body, headers, signal, keepalive, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (reply.ok) return reply;
  const { error = {} } = await reply.json().catch(() => ({}));
  const message = error.message ?? `The server answered ${reply.status}.`;
  throw new ApiError(message, { status: reply.status, hint: error.hint });
}

export const get = async (path, signal) => (await ask(path, { signal })).json();

/** A message of docs/wire.md that has no arrays: magic, two lengths, JSON. */
function message(tree) {
  const header = new TextEncoder().encode(JSON.stringify(tree));
  const data = new Uint8Array(16 + header.length);
  data.set([0x57, 0x56, 0x52, 1]);
  new DataView(data.buffer).setUint32(4, header.length, true);
  data.set(header, 16);
  return data;
}

/** Streams samples side by side; `piece(i, delta)` gets the tokens of operation `i` as they come. */
export async function sample(operations, { piece, failed, signal }) {
  const opened = await ask("v1/sessions", { method: "POST", body: "{}", signal });
  const session = `v1/sessions/${(await opened.json()).session_id}`;
  try {
    const submissions = operations.map((operation, i) => ({ id: `sample-${i}`, operation }));
    const body = message(submissions);
    const type = "application/vnd.weaver";
    await ask(`${session}/submissions`, { method: "POST", body, type, signal });
    await Promise.all(operations.map((_, i) =>
      follow(`${session}/stream/sample-${i}`, (delta) => piece(i, delta), signal)
        .catch((error) => { if (!signal.aborted) failed(i, error); })));
  } finally {
    ask(session, { method: "DELETE", keepalive: true }).catch(() => {}); // it ends with its own time-out
  }
}

async function follow(path, piece, signal) {
  const reader = (await ask(path, { signal })).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let { value, done } = await reader.read(); !done; { value, done } = await reader.read()) {
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const field = (name) => event.match(new RegExp(`^${name}: (.*)$`, "m"))?.[1];
      if (field("event") === "error") {
        const { message, hint } = JSON.parse(field("data"));
        throw new ApiError(message, { hint });
      }
      if (field("event") === "end") return;
      if (field("data")) piece(JSON.parse(field("data")));
    }
  }
  throw new ApiError("The stream broke off.", { hint: "Sample again: the same seed repeats it." });
}
