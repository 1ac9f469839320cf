// Draws the report from the JSON beside it. Text enters the page as text nodes only.
const state = { colour: "gap" };

// --- summary -----------------------------------------------------------------------------------

const last = (name) => (D.metrics[name] ?? []).findLast((v) => v !== null);
const first = (name) => (D.metrics[name] ?? []).find((v) => v !== null);

$("subtitle").textContent = D.subtitle;
function tile(label, value, note = "") {
  if (value === undefined) return;
  $("tiles").append(el("div", { class: "tile" }, el("span", {}, label), el("b", {}, value), el("small", {}, note && " " + note)));
}
const from = (name) => first(name) !== undefined && D.steps.length > 1 ? "from " + number(first(name)) : "";
const shown = (name) => last(name) === undefined ? undefined : number(last(name));
tile("Steps", number(D.last_step));
tile("Reward", shown("reward/mean"), from("reward/mean"));
const evaluated = D.steps.findLast((_, i) => (D.metrics["eval/mean"] ?? [])[i] != null);
tile("Held-out", shown("eval/mean"), [from("eval/mean"), evaluated < D.last_step && "at step " + evaluated].filter(Boolean).join(", "));
function best(label, name) { // where it is not the last
  const list = D.metrics[name] ?? [], top = Math.max(...list.filter((v) => v !== null));
  if (list.length > 1 && top > last(name)) tile(label, number(top), "at step " + D.steps[list.indexOf(top)]);
}
best("Best reward", "reward/mean");
best("Best held-out", "eval/mean");
tile("Loss", shown("train/loss"), from("train/loss"));
tile("Entropy", shown("train/entropy") ?? shown("policy/surprise"), from(D.metrics["train/entropy"] ? "train/entropy" : "policy/surprise"));
const gaps = (D.metrics["gap/max"] ?? []).filter((v) => v !== null);
tile("Largest gap", gaps.length ? number(Math.max(...gaps)) : undefined, "nats");
tile("Tokens / s", shown("tokens/per_second"));
tile("Time", D.seconds ? duration(D.seconds) : undefined);

for (const hint of D.hints) {
  $("hints").append(el("div", { class: "hint" + (hint.good ? " fine" : "") }, el("b", {}, hint.steps + ": "), hint.text));
}

// --- curves ------------------------------------------------------------------------------------

startCurves([{ steps: D.steps, metrics: D.metrics }], (index) => open(D.steps[index]));

// --- samples -----------------------------------------------------------------------------------

// Values of a token; gaps and advantages are undefined where it was not trained on.
const COLOURS = {
  gap: { label: "log-probability gap", low: "1e-7", high: "1e-3 nats and more", of: (s, i) => s.gaps?.[i], alpha: (v) => v ? Math.min(1, Math.max(0, (Math.log10(Math.abs(v)) + 7) / 4)) : 0 },
  advantage: { label: "advantage", signed: true, of: (s, i) => s.advantages?.[i], alpha: (v, top) => v ? 0.2 + 0.8 * Math.abs(v) / top : 0 },
  surprise: { label: "surprise (−log-probability)", low: "0", high: "4 nats and more", of: (s, i) => -s.logprobs[i], alpha: (v) => Math.min(1, v / 4) },
  version: { label: "version of the weights", low: "older", high: "newest", of: (s, i) => s.versions[i], alpha: (v, top, bottom) => top === bottom ? 0.25 : (v - bottom) / (top - bottom) },
};
const sampleSteps = Object.keys(D.samples).map(Number).sort((a, b) => a - b);
let step = sampleSteps.at(-1);

function segmentsOf(at) { return D.samples[at].flatMap((g) => g.rollouts.flatMap((r) => r.segments)); }
function segments() { return segmentsOf(step); }
// The parts of an advantage, and what was measured for them, under the names that the run gave.
for (const name of new Set(sampleSteps.flatMap((at) => segmentsOf(at).flatMap((s) => Object.keys(s.credit ?? {})))))
  COLOURS["credit " + name] = { label: name.includes("/") ? name + " (nats)" : "credit: " + name, signed: true, of: (s, i) => s.credit?.[name]?.[i], alpha: COLOURS.advantage.alpha };

function drawSamples() {
  $("groups").replaceChildren();
  $("detail").textContent = "Point at a token, or focus a reply and use ← →.";
  $("step-out").value = step;
  $("step").value = sampleSteps.indexOf(step);
  $("step").setAttribute("aria-valuetext", "step " + step);
  $("previous").disabled = step === sampleSteps[0];
  $("next").disabled = step === sampleSteps.at(-1);
  const colour = COLOURS[state.colour];
  const values = segments().flatMap((s) => s.mask.flatMap((m, i) => m ? [colour.of(s, i)] : [])).filter((v) => v !== null && v !== undefined && !Number.isNaN(v));
  const top = colour.signed ? Math.max(0, ...values.map(Math.abs)) : Math.max(...values), bottom = Math.min(...values);
  drawLegend(colour, top, values.length);
  const groups = D.samples[step].map((group) => drawGroup(group, colour, top, bottom));
  for (const side of [0, 1]) $("groups").append(el("div", { class: "side" }, ...groups.filter((_, i) => i % 2 === side)));
}

function drawLegend(colour, top, count) {
  $("legend").replaceChildren();
  if (!count) { $("legend").append("not known at this step"); return; }
  const swatch = el("span", { class: "swatch" });
  swatch.style.background = colour.signed ? "linear-gradient(90deg, rgb(var(--neg) / .65), transparent, rgb(var(--pos) / .65))" : "linear-gradient(90deg, transparent, rgb(var(--hot) / .65))";
  $("legend").append(colour.low ?? number(-top), swatch, colour.high ?? "+" + number(top));
}

function drawGroup(group, colour, top, bottom) {
  const title = el("h4", {}, el("span", {}, group.label), el("span", {}, "mean reward " + number(group.mean)));
  const task = el("div", { class: "task" });
  for (const [key, value] of Object.entries(group.task)) task.append(key + " ", el("code", {}, value), "  ");
  const node = el("div", { class: "group" }, title, task);
  const equal = new Map(); // replies of the same tokens and reward are shown once
  for (const one of group.rollouts) {
    const key = JSON.stringify([one.segments.map((s) => s.tokens), one.reward, one.advantage, one.failure]);
    equal.set(key, [...(equal.get(key) ?? []), one]);
  }
  for (const [rollout, ...others] of equal.values()) {
    const notes = others.length ? [others.length + 1 + " times"] : [];
    if (rollout.advantage !== null) notes.push("A " + (rollout.advantage > 0 ? "+" : "") + number(rollout.advantage));
    if (rollout.stop_reason === "length") notes.push("cut off");
    if (rollout.turns > 1) notes.push(rollout.turns + " turns");
    if (!rollout.trained) notes.push("not trained");
    const reward = el("div", { class: "reward" }, rollout.failure ? "failed" : number(rollout.reward), ...notes.map((n) => el("small", {}, n)));
    const body = el("div", {}, ...rollout.segments.map((s) => drawTokens(s, colour, top, bottom)));
    if (rollout.failure) body.append(el("div", { class: "failure" }, rollout.failure));
    node.append(el("div", { class: "rollout" }, reward, body));
  }
  if (group.left_out) node.append(el("p", { class: "muted" }, group.left_out + " more in the transcripts"));
  return node;
}

function drawTokens(segment, colour, top, bottom) {
  const box = el("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Tokens: " + segment.pieces.join("") });
  segment.pieces.forEach((text, i) => {
    const token = el("span", { class: segment.mask[i] ? "t" : "t read" });
    for (const part of text.split(/(\n)/)) if (part === "\n") token.append(el("i", {}, "⏎"), "\n"); else if (part) token.append(part);
    if (!text) token.append(el("i", {}, "·"));
    const value = segment.mask[i] ? colour.of(segment, i) : null;
    if (value !== null && value !== undefined && !Number.isNaN(value)) {
      token.style.setProperty("--a", (0.65 * colour.alpha(value, top, bottom)).toFixed(3));
      if (colour.signed) token.classList.add(value < 0 ? "neg" : "pos");
    }
    box.append(token);
  });
  if (segment.left_out) box.append(el("i", {}, " … " + segment.left_out + " more tokens"));
  let at = -1;
  const choose = (i) => {
    box.querySelector(".on")?.classList.remove("on");
    at = Math.min(segment.pieces.length - 1, Math.max(0, i));
    box.children[at].classList.add("on");
    describe(segment, at);
  };
  box.onpointerover = (event) => { const token = event.target.closest(".t"); if (token) choose([...box.children].indexOf(token)); };
  box.onpointerleave = box.onblur = () => box.querySelector(".on")?.classList.remove("on");
  box.onkeydown = (event) => {
    const jump = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
    if (jump) { choose(at < 0 ? Math.max(0, segment.mask.indexOf(1)) : at + jump); event.preventDefault(); }
  };
  return box;
}

function describe(segment, i) {
  const facts = ["token " + segment.tokens[i]];
  if (segment.mask[i]) {
    facts.push("log-probability " + number(segment.logprobs[i]), "when drawn " + number((segment.sampling_logprobs ?? segment.logprobs)[i]));
    if (segment.gaps) facts.push("gap " + number(segment.gaps[i]), "advantage " + number(segment.advantages[i]));
    for (const [name, values] of Object.entries(segment.credit ?? {})) facts.push(name + " " + number(values[i]));
    facts.push("weights of optimizer step " + segment.versions[i]);
  } else facts.push("read, not sampled");
  $("detail").replaceChildren(el("code", {}, JSON.stringify(segment.pieces[i])), "  " + facts.join(" · "));
}

function go(where) { step = sampleSteps[Math.min(sampleSteps.length - 1, Math.max(0, where))]; drawSamples(); }
function open(wanted) {
  if (!sampleSteps.length) return;
  go(sampleSteps.reduce((best, s, i) => Math.abs(s - wanted) < Math.abs(sampleSteps[best] - wanted) ? i : best, 0));
  $("samples").scrollIntoView();
}
for (const [key, colour] of Object.entries(COLOURS)) $("colour").append(el("option", { value: key }, colour.label));
$("colour").onchange = () => { state.colour = $("colour").value; drawSamples(); };
$("step").max = Math.max(0, sampleSteps.length - 1);
$("step").oninput = () => go(Number($("step").value));
$("previous").onclick = () => go(sampleSteps.indexOf(step) - 1);
$("next").onclick = () => go(sampleSteps.indexOf(step) + 1);
$("samples").hidden = $("opens").hidden = !sampleSteps.length;
if (sampleSteps.length) drawSamples();

// --- configuration -----------------------------------------------------------------------------

for (const [name, value] of D.config) $("config").tBodies[0].append(el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)));
$("footer").textContent = D.footer;
