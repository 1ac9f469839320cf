"use strict";
// What every page begins with: its data, elements, numbers and the theme.
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "circle", "text"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size === 0 || Number.isInteger(value) && size < 1e6) return value.toLocaleString("en-US");
  if (size >= 1000) return size < 1e7 ? Math.round(value).toLocaleString("en-US") : value.toExponential(2);
  return size >= 1e-3 ? String(Number(value.toPrecision(3))) : value.toExponential(1).replace(".0e", "e");
}

function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 120) return s + " s";
  return s < 7200 ? Math.floor(s / 60) + " m " + s % 60 + " s" : Math.floor(s / 3600) + " h " + Math.floor(s % 3600 / 60) + " m";
}

// --- theme -------------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");
let theme = null;
function paint() {
  const now = theme ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = now;
  $("theme").textContent = now === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", "Switch to the " + $("theme").textContent.toLowerCase() + " theme");
}
$("theme").onclick = () => { theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark"; paint(); };
dark.onchange = paint;
paint();
