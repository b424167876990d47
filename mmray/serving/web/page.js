"use strict";

const at = (id) => document.getElementById(id);
const make = (tag, text, className) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
};

let model = null; // the answer of /v1/model
let picture = null; // Blob
let asked = 0; // the latest question; answers to earlier ones are dropped

async function call(path, options = {}) {
  const headers = { ...options.headers };
  const token = at("token").value.trim();
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The server does not answer.");
  }
  if (response.ok) return response.json();
  const problem = await response.json().catch(() => ({ reason: `HTTP ${response.status}` }));
  if (response.status === 401) {
    at("token-row").hidden = false;
    throw new Error("This server asks for an access token.");
  }
  throw new Error(explain(problem));
}

const explain = (problem) =>
  problem.detail ? `${problem.reason}: ${problem.detail}` : problem.reason;

// --- what the server can do ----------------------------------------------------------------------

async function start() {
  try {
    model = await call("/v1/model");
  } catch (error) {
    at("about").textContent = error.message;
    return;
  }
  at("about").textContent =
    `Labels: ${model.labels.join(", ")}. Model ${model.fingerprint.slice(0, 12)}.`;
  at("image-row").hidden = model.inputs.image === "unused";
  at("caption-row").hidden = model.inputs.caption === "unused";
  at("caption").maxLength = model.limits.caption_chars;
  try {
    showExamples((await call("/v1/examples")).examples);
  } catch {
    at("examples-section").hidden = true; // the page is whole without them
  }
}

function showExamples(examples) {
  at("examples").replaceChildren(...examples.map(exampleItem));
  at("examples-section").hidden = examples.length === 0;
}

function exampleItem(example, index) {
  const button = make("button");
  button.type = "button";
  const blob = example.image === null ? null : decoded(example.image);
  if (blob) {
    const image = make("img");
    image.src = URL.createObjectURL(blob);
    image.alt = "";
    button.append(image);
  }
  button.append(make("span", example.caption ?? ""));
  button.setAttribute("aria-label", `Example ${index + 1}: ${example.caption ?? "picture only"}`);
  button.addEventListener("click", () => {
    choose(blob);
    at("caption").value = example.caption ?? "";
    score();
    at("status").scrollIntoView({ block: "nearest" });
  });
  const item = make("li");
  item.append(button);
  return item;
}

const decoded = (base64) => new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))]);

// --- a picture -----------------------------------------------------------------------------------

function choose(blob) {
  picture = blob;
  if (at("preview").src) URL.revokeObjectURL(at("preview").src);
  at("preview").hidden = at("clear").hidden = !blob;
  at("drop-text").hidden = Boolean(blob);
  at("unshown").hidden = true;
  if (blob) {
    at("preview").src = URL.createObjectURL(blob);
    at("preview").alt = blob.name ? `Chosen picture, ${blob.name}` : "Chosen picture";
  } else {
    at("preview").removeAttribute("src");
    at("file").value = "";
  }
}

at("preview").addEventListener("error", () => {
  if (!picture) return; // shown by no browser, read by the server perhaps: TIFF, for example
  at("preview").hidden = true;
  at("unshown").hidden = false;
  at("unshown").textContent = `${picture.name || "A picture"}: this browser cannot show it`;
});
at("file").addEventListener("change", () => {
  if (at("file").files.length) choose(at("file").files[0]);
});
at("clear").addEventListener("click", () => {
  choose(null);
  at("file").focus();
});

const firstPicture = (items) =>
  [...(items ?? [])].find((item) => item.kind === "file" && item.type.startsWith("image/"));

document.addEventListener("paste", (event) => {
  const item = firstPicture(event.clipboardData.items);
  if (item) {
    choose(item.getAsFile());
    event.preventDefault();
  }
});
document.addEventListener("dragover", (event) => {
  event.preventDefault(); // else the browser leaves the page for a dropped picture
  at("drop").classList.add("over");
});
for (const name of ["dragleave", "drop"])
  document.addEventListener(name, () => at("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
});

// --- scores --------------------------------------------------------------------------------------

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (at("go").ariaDisabled !== "true") score();
});
at("caption").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) score();
});

async function score() {
  if (!model) await start();
  if (!model) return;
  const mine = ++asked;
  at("go").ariaDisabled = "true"; // a button that is disabled loses the focus
  say("Scoring …");
  try {
    const began = performance.now();
    const answer = await call("/v1/score", { method: "POST", body: form() });
    const milliseconds = Math.round(performance.now() - began);
    if (mine !== asked) return;
    say("");
    at("results").replaceChildren(...shown(answer, milliseconds));
    await showWithout(mine);
  } catch (error) {
    if (mine === asked) {
      at("results").replaceChildren();
      say(error.message, true);
    }
  } finally {
    if (mine === asked) at("go").ariaDisabled = "false";
  }
}

function say(text, bad = false) {
  at("status").textContent = text;
  at("status").className = bad ? "problem" : "";
}

function form(without = "") {
  const body = new FormData();
  if (picture && without !== "image" && model.inputs.image !== "unused")
    body.append("image", picture, "picture");
  const caption = at("caption").value;
  if (caption && without !== "caption" && model.inputs.caption !== "unused")
    body.append("caption", caption);
  return body;
}

function shown(answer, milliseconds) {
  const title = make("p", answer.label || "No label", "verdict");
  const time = make("p", `${milliseconds} ms, of which ${Math.round(answer.seconds * 1000)} in the server`, "note");
  return [title, bars(answer), time];
}

function bars(answer) {
  const list = make("ul", undefined, "bars");
  const scores = Object.entries(answer.scores).sort((a, b) => b[1] - a[1]);
  for (const [label, score] of scores) {
    const item = make("li");
    const percent = `${(100 * score).toFixed(1)} %`;
    const given = model.task === "multilabel" ? score >= 0.5 : label === answer.label;
    const line = make("span", undefined, given ? "best" : "");
    line.append(make("span", label), make("span", percent));
    const meter = make("meter");
    meter.max = 1;
    meter.value = score;
    meter.setAttribute("aria-label", `${label}: ${percent}`);
    item.append(line, meter);
    list.append(item);
  }
  return list;
}

// The same pair without its picture, and without its caption, where the model takes such.
async function showWithout(mine) {
  const both = form().has("image") && form().has("caption");
  for (const [name, words] of [["image", "Without the picture"], ["caption", "Without the caption"]]) {
    if (!both || model.inputs[name] !== "optional") continue;
    const answer = await call("/v1/score", { method: "POST", body: form(name) });
    if (mine !== asked) return;
    const part = make("div", undefined, "small");
    part.append(make("h3", `${words}: ${answer.label || "no label"}`), bars(answer));
    at("results").append(part);
  }
}

at("token").addEventListener("change", start);
start();
