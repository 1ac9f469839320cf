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

/** What an error of the server says, behind the name of the field that it is about. */
export const messageOf = ({ field, message }) => (field ? `${field}: ${message}` : message);

/** An answer as it comes, whatever its status. */
export async function raw(path, { method = "GET", body, type = "application/json", signal, keepalive } = {}) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  if (body) headers["Content-Type"] = type;
  try {
    return await fetch(path, { method, body, headers, signal, keepalive, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached.");
  }
}

/** An answer that is none of an error: those are thrown. */
export async function ask(path, options) {
  const reply = await raw(path, options);
  if (reply.ok) return reply;
  const { error = {} } = await reply.json().catch(() => ({}));
  const { message = `The server answered ${reply.status}.`, field } = error;
  const words = reply.status === 404 ? message : messageOf({ field, message }); // what is missing is named already
  throw new ApiError(words, { status: reply.status, hint: error.hint });
}

export const get = async (path, signal) => (await ask(path, { signal })).json();

/** Asks for a change, with a body of JSON; answers what the server does, or null. */
export async function change(method, path, body) {
  const reply = await ask(path, { method, body: body && JSON.stringify(body) });
  return reply.status === 204 ? null : reply.json();
}

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
  for await (const { event, data } of events(path, { signal })) {
    if (event === "error") {
      const error = JSON.parse(data);
      throw new ApiError(messageOf(error), { hint: error.hint });
    }
    if (event === "end") return;
    if (data) piece(JSON.parse(data));
  }
  throw new ApiError("The stream broke off.", { hint: "Sample again: the same seed repeats it." });
}

/** The server-sent events of an answer: `{ event, data }`, each undefined where there is none. */
export async function* events(path, options) {
  const { signal } = options;
  const reader = (await ask(path, options)).body.pipeThrough(new TextDecoderStream()).getReader();
  const read = () => reader.read().catch((error) => {
    throw signal?.aborted ? error : new ApiError("The connection to the server broke off.");
  });
  let rest = "";
  for (let { value, done } = await read(); !done; { value, done } = await read()) {
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const field = (name) => part.match(new RegExp(`^${name}: (.*)$`, "m"))?.[1];
      yield { event: field("event"), data: field("data") };
    }
  }
}
