// A page of the OpenAPI document: every route with its parameters, bodies and answers.
import { get } from "./api.js";
import { h, table } from "./dom.js";
import { tryForm } from "./try.js";

const main = document.getElementById("main");
const METHODS = ["get", "post", "put", "patch", "delete"];

function typeOf(schema = {}) {
  const { $ref, type, anyOf, oneOf, allOf, items, prefixItems, enum: values, format } = schema;
  if ($ref) return $ref.split("/").at(-1);
  if (anyOf ?? oneOf ?? allOf) return (anyOf ?? oneOf ?? allOf).map(typeOf).join(" | ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (values) return values.map((value) => JSON.stringify(value)).join(" | ");
  if (prefixItems) return `[${prefixItems.map(typeOf).join(", ")}]`;
  if (type === "array") return typeOf(items).includes(" | ") ? `(${typeOf(items)})[]` : `${typeOf(items)}[]`;
  return format ? `${type} (${format})` : type ?? "any";
}

/** Fields of an object, and below them the schemas that they name, each once. */
function shape(schema, schemas, seen = new Set()) {
  const names = JSON.stringify(schema ?? {}).matchAll(/"\$ref":"#\/components\/schemas\/([^"]+)"/g);
  return [...names].flatMap(([, name]) => {
    if (seen.has(name)) return [];
    seen.add(name);
    const { properties = {}, required = [], description } = schemas[name];
    const fields = Object.entries(properties).map(([field, of]) =>
      `${field}${required.includes(field) ? "" : "?"}: ${typeOf(of)}`);
    return [h("p", { class: "quiet" }, h("code", {}, name), description ? `: ${description}` : ""),
      h("pre", { tabindex: 0 }, fields.join("\n")), ...shape(schemas[name], schemas, seen)];
  });
}

function contents(what, content, schemas) {
  return Object.entries(content ?? {}).flatMap(([type, { schema }]) =>
    [h("h3", {}, what), h("p", {}, h("code", {}, type), " ", typeOf(schema)), ...shape(schema, schemas)]);
}

/** The form is made when the route is unfolded: there are many. */
function trying(path, method, operation, schemas) {
  const place = h("div", {}, h("h3", {}, "Try it"));
  const unfold = ({ target }) => {
    if (target.open && place.childElementCount === 1) place.append(tryForm(path, method, operation, schemas));
  };
  return { place, unfold };
}

function route(path, method, operation, schemas) {
  const { summary = "", description = "", parameters = [], requestBody, responses = {} } = operation;
  const { place, unfold } = trying(path, method, operation, schemas);
  return h("details", { class: "route", id: `${method}-${path}`, toggle: unfold },
    h("summary", {}, h("b", {}, method.toUpperCase()), h("code", {}, path), h("span", { class: "quiet" }, summary)),
    h("div", {}, h("p", {}, description), place,
      parameters.length ? table("Parameters", [["Parameter", "name"], ["In"], ["Type", "long"]], parameters.map((one) =>
        [h("code", {}, one.name + (one.required ? "" : "?")), one.in, typeOf(one.schema)]), "") : null,
      contents("Body", requestBody?.content, schemas),
      Object.entries(responses).flatMap(([status, { content, description: words }]) => /^[23]/.test(status)
        ? [h("h3", {}, `Answer ${status}`), words === "Successful Response" ? null : h("p", {}, words), ...contents("", content, schemas).slice(1)]
        : [])));
}

try {
  const { info, paths, components } = await get("openapi.json");
  const groups = new Map();
  for (const [path, methods] of Object.entries(paths)) {
    const group = path.match(/^(\/api)?\/v\d+/)?.[0] ?? "/";
    const shown = METHODS.filter((method) => methods[method]).map(
      (method) => route(path, method, methods[method], components.schemas));
    groups.set(group, [...(groups.get(group) ?? []), ...shown]);
  }
  main.replaceChildren(h("h1", {}, info.title), h("p", {}, info.description),
    h("p", { class: "quiet" }, "Every request carries a key: ", h("code", {}, "Authorization: Bearer wv-…"),
      ". The document itself is ", h("a", { href: "openapi.json" }, "openapi.json"), "."),
    ...[...groups].flatMap(([group, routes]) => [h("h2", {}, group), ...routes]));
} catch (error) {
  main.replaceChildren(h("p", { class: "problem", role: "alert" }, error.message));
}
