"use strict";

const make = (tag, text) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  return node;
};

function table(title, rows) {
  const whole = make("table");
  whole.append(make("caption", title));
  for (const cells of rows) {
    const line = whole.insertRow();
    for (const cell of cells) line.insertCell().textContent = cell;
  }
  return whole;
}

function named(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.properties) return `{ ${Object.keys(schema.properties).join(", ")} }`;
  if (schema.anyOf) return schema.anyOf.map(named).join(" or ");
  if (schema.type === "array") return `list of ${named(schema.items)}`;
  return [schema.type ?? "anything"].flat().join(" or ");
}

function route(method, path, operation) {
  const section = make("section");
  section.append(make("h2", `${method.toUpperCase()} ${path}`));
  const bodies = Object.entries(operation.requestBody?.content ?? {});
  if (bodies.length)
    section.append(table("Body", bodies.map(([kind, body]) => [kind, named(body.schema)])));
  const answers = Object.entries(operation.responses).map(([status, answer]) => [
    status,
    answer.description,
    Object.entries(answer.content ?? {}).map(([kind, body]) => `${kind}: ${named(body.schema)}`).join("; "),
  ]);
  section.append(table("Answers", answers));
  return section;
}

function model(name, schema) {
  const section = make("section");
  section.append(make("h3", name));
  const rows = Object.entries(schema.properties ?? {}).map(([field, of]) => [
    field, named(of), of.description ?? "",
  ]);
  section.append(table(schema.description ?? "Fields", rows));
  return section;
}

async function start() {
  for (const id of ["here", "there"]) document.getElementById(id).textContent = location.origin;
  const document_ = await (await fetch("/openapi.json")).json();
  const routes = [];
  for (const [path, operations] of Object.entries(document_.paths))
    for (const [method, operation] of Object.entries(operations))
      routes.push(route(method, path, operation));
  routes.push(make("h2", "What is in them"));
  for (const [name, schema] of Object.entries(document_.components.schemas))
    routes.push(model(name, schema));
  document.getElementById("routes").replaceChildren(...routes);
}

start();
