// Elements without markup strings, changes in place, and words for numbers and times.

const SVG = new Set(["svg", "path", "line"]);

/** An element: `h("a", { href: "#/runs" }, "Runs")`. Text is only ever text. */
export function h(tag, props = {}, ...children) {
  const node = SVG.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (typeof value === "object") node[name] = value;
    else if (value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Makes `old` look like `fresh` and keeps its focus, its listeners and what is unfolded. */
export function morph(old, fresh) {
  if (old.nodeName !== fresh.nodeName || old.id !== fresh.id) return old.replaceWith(fresh);
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  if (fresh.curve) old.curve = fresh.curve;
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && name !== "open" && name !== "style") old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (old.type === "checkbox") old.checked = fresh.checked;
  const [mine, theirs] = [[...old.childNodes], [...fresh.childNodes]];
  theirs.forEach((child, i) => (i < mine.length ? morph(mine[i], child) : old.append(child)));
  mine.slice(theirs.length).forEach((child) => child.remove());
}

/** A table, or in its place a sentence when it has no rows. Cells are strings or nodes. */
export function table(label, columns, rows, empty) {
  if (!rows.length) return h("p", { class: "quiet" }, empty);
  const cell = (content, i) => {
    const [title, kind = ""] = columns[i];
    return h("td", { class: kind, "data-title": title }, content ?? "");
  };
  const head = columns.map(([title, kind = ""]) => h("th", { scope: "col", class: kind }, title));
  return h("div", { class: "table" }, h("table", { "aria-label": label },
    h("thead", {}, h("tr", {}, head)),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map(cell))))));
}

export const link = (href, ...text) => h("a", { href }, ...text);

/** Names and values in a row. */
export const facts = (pairs) => h("dl", { class: "facts" },
  pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));

/** Four digits that matter: 0.5123, 1.2e-5, 12,345. */
export function number(value) {
  const size = Math.abs(value);
  if (size >= 1e7 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace("-", "−");
  const text = value.toLocaleString("en", { maximumSignificantDigits: Math.max(4, `${Math.trunc(size)}`.length) });
  return text.replace("-", "−");
}

export function bytes(count) {
  const power = count < 1000 ? 0 : Math.min(5, Math.floor(Math.log10(count) / 3));
  const shown = count / 1000 ** power;
  return `${power && shown < 10 ? shown.toFixed(1) : Math.round(shown)} ${["B", "kB", "MB", "GB", "TB", "PB"][power]}`;
}

export function span(seconds) {
  if (seconds < 1) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 60) return `${seconds < 10 && seconds % 1 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const [size, unit] = [[86400, "d"], [3600, "h"], [60, "min"]].find(([size]) => seconds >= size);
  return `${Math.floor(seconds / size)} ${unit}`;
}

/** A point in time as the distance from now, and in full on hover. */
export function when(iso) {
  const away = Math.round((new Date(iso) - Date.now()) / 1000);
  const words = Math.abs(away) < 5 ? "now" : away > 0 ? `in ${span(away)}` : `${span(-away)} ago`;
  return h("time", { datetime: iso, title: new Date(iso).toLocaleString() }, words);
}
