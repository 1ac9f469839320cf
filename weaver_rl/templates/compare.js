// Draws a comparison of runs from the JSON beside it. Text enters the page as text nodes only.
$("subtitle").textContent = D.subtitle;
startCurves(D.runs);

for (const run of RUNS) {
  const box = el("input", { type: "checkbox" });
  box.checked = true;
  box.onchange = () => { run.hidden = !box.checked; move(view.index); };
  $("runs").append(el("label", { class: "run-" + run.number % COLOURED + (run.number >= COLOURED ? " dashed" : ""), title: run.folder }, box, el("i", {}), run.label));
}

// --- values ------------------------------------------------------------------------------------

const head = ["Run", "last", "best", "mean of the last " + D.window, "difference"];
$("values").tHead.append(el("tr", {}, ...head.map((text) => el("th", { scope: "col" }, text))));
for (const [name, rows] of D.values) {
  $("values").tBodies[0].append(el("tr", {}, el("th", { colspan: head.length, scope: "rowgroup" }, name)));
  for (const one of rows) {
    const best = el("td", {}, number(one.best));
    if (one.best_step !== null) best.append(el("small", {}, " at " + one.best_step));
    const change = one.difference === null ? "–" : (one.difference > 0 ? "+" : "") + number(one.difference);
    $("values").tBodies[0].append(el("tr", {}, el("td", {}, one.run), el("td", {}, number(one.last)), best, el("td", {}, number(one.mean_of_last)), el("td", {}, change)));
  }
}

for (const [folder, why] of D.left_out) $("left-out").append(el("div", { class: "hint" }, el("b", {}, folder + ": "), why));
$("left-out").hidden = !D.left_out.length;

// --- configuration -----------------------------------------------------------------------------

for (const [name, values] of D.config) {
  const cells = values.map(([value, runs]) => el("div", {}, value + " ", el("span", { class: "muted" }, runs.join(", "))));
  $("config").tBodies[0].append(el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, ...cells)));
}
if (!D.config.length) $("config").tBodies[0].append(el("tr", {}, el("td", {}, "Nothing.")));
$("footer").textContent = D.footer;
