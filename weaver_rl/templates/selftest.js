// Draws the results of the learning proofs from the JSON beside it.
for (const [label, value] of D.tiles) {
  $("tiles").append(el("div", { class: "tile" }, el("span", {}, label), el("b", {}, value)));
}

function verdict(proof) {
  if (!proof.runs.length) return ["waiting", "waits"];
  if (!proof.runs.every((run) => run.passed)) return ["failed", "failed"];
  return proof.runs.length < proof.seeds ? ["waiting", proof.runs.length + " of " + proof.seeds + " seeds"] : ["passed", "passed"];
}

function curves(proof) {
  const W = 300, H = 90, lists = proof.runs.map((run) => run.curve).filter((list) => list.length > 1);
  if (!lists.length) return "";
  const svg = el("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "Curve by step, " + lists.length + " runs" });
  const all = lists.flat(), low = Math.min(0, ...all), high = Math.max(1, ...all);
  for (const value of [low, high]) {
    const y = 84 - (value - low) / (high - low) * 78;
    svg.append(el("line", { class: "grid", x1: 26, x2: W, y1: y, y2: y }), el("text", { x: 20, y: y + 3, "text-anchor": "end" }, number(value)));
  }
  for (const list of lists) {
    const points = list.map((v, i) => (26 + i / (list.length - 1) * (W - 28)).toFixed(1) + " " + (84 - (v - low) / (high - low) * 78).toFixed(1));
    svg.append(el("path", { class: "line", d: "M" + points.join("L") }));
  }
  return svg;
}

for (const proof of D.proofs) {
  const [kind, text] = verdict(proof);
  const rows = proof.runs.map((run) => el("li", {}, "seed " + run.seed + ": ", el("b", {}, number(run.value)), ...[run.note, duration(run.seconds)].filter(Boolean).map((part) => " · " + part)));
  $(proof.control ? "controls" : "proofs").append(
    el("article", { class: "card proof" },
      el("h4", {}, el("span", {}, proof.name), el("span", { class: "verdict " + kind }, text)),
      el("p", {}, proof.claim), el("p", { class: "muted" }, proof.gate), curves(proof), el("ul", {}, ...rows)));
}
$("subtitle").textContent = D.subtitle;
$("footer").textContent = D.footer;
