// A value that a JSON schema allows, to begin a request with.

const resolved = (schema, schemas) => (schema.$ref ? schemas[schema.$ref.split("/").at(-1)] : schema);

/** Its example or default, else the least that it requires; lists have one item. */
export function example(schema, schemas, depth = 0) {
  const of = resolved(schema ?? {}, schemas);
  const known = of.example ?? of.examples?.[0] ?? of.default ?? of.const ?? of.enum?.[0];
  if (known !== undefined) return known;
  const below = (inner) => (depth < 8 ? example(inner, schemas, depth + 1) : null);
  const choices = of.anyOf ?? of.oneOf;
  if (choices) return below(choices.find(({ type }) => type !== "null") ?? {});
  if (of.allOf) return Object.assign({}, ...of.allOf.map(below));
  if (of.prefixItems) return of.prefixItems.map(below);
  switch (of.type) {
    case "object": return Object.fromEntries((of.required ?? []).map((name) => [name, below(of.properties[name])]));
    case "array": return of.items ? [below(of.items)] : [];
    case "integer": case "number": return of.minimum ?? of.exclusiveMinimum ?? 0;
    case "boolean": return false;
    case "string": return "";
    default: return null;
  }
}
