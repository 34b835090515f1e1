"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const MEAN = data.mean, hidden = new Set(), LEFT = 48, TOP = 14, WIDTH = 760, HEIGHT = 430;
const colour = name => { const g = data.groups.find(g => g.name === name); return `light-dark(${g.light}, ${g.dark})`; };
const fixed = (v, d = 2) => v === null || v === undefined || v === "" ? "–" : Number(v).toFixed(d);
// Names come from records that anybody may have made. Markup is made by html`…` alone, in which every value that is not
// markup itself, or a list of such, becomes text; and put() is all that writes it into the page.
class Markup { constructor(text) { this.text = text; } }
const escape = s => String(s).replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);
const written = v => v instanceof Markup ? v.text : Array.isArray(v) ? v.map(written).join("") : escape(v);
const html = (strings, ...values) => new Markup(strings.reduce((all, s, i) => all + written(values[i - 1]) + s));
const put = (element, markup) => { element.innerHTML = markup instanceof Markup ? markup.text : escape(markup); };
const words = task => task === MEAN ? "all tasks" : task.replace(/_/g, " ");
let task = MEAN, zoomed = false, view = null;

$("run").textContent = data.run;
$("how").textContent = data.how;
put($("facts"), html`${data.facts.map(f => html`<div class="fact"><b>${f[0]}</b><span>${f[1]}</span></div>`)}`);
put($("tasks"), html`${[MEAN, ...data.tasks].map(t => html`<button data-task="${t}">${words(t)}</button>`)}<button
  id="zoom" style="margin-left:auto">zoom to the best part</button>`);
$("tasks").onclick = event => {
  if (event.target.dataset.task) task = event.target.dataset.task; else if (event.target.id === "zoom") zoomed = !zoomed; else return;
  draw();
};
put($("legend"), html`${[...data.groups].reverse().map(g => {
  const members = data.families.filter(f => f.group === g.name);
  return members.length ? html`<h3><span class="dot" style="background:${colour(g.name)}"></span>${g.name}</h3>${members.map(f =>
    html`<label data-family="${f.name}"><input type="checkbox" checked>${f.name}</label>`)}` : "";
})}`);
for (const label of document.querySelectorAll("#legend label")) {
  label.onmouseenter = () => focus(label.dataset.family);
  label.onmouseleave = () => focus(null);
  label.firstChild.onchange = e => { hidden[e.target.checked ? "delete" : "add"](label.dataset.family); draw(); };
}

// What part of the plane is shown: all of it, or where most tokens come at most accuracy.
function frame() {
  const cells = data.families.flatMap(f => f.points.map(p => p.cells[task])), fast = Math.max(...cells.map(c => c.tpf));
  const good = cells.filter(c => c.tpf >= fast / 3), low = Math.min(...cells.map(c => c.accuracy));
  const floor = v => Math.max(0, Math.min(90, 10 * Math.floor((v - 1) / 10)));
  if (!zoomed) return {x: data.range, y: [floor(low), 100]};
  const right = Math.max(...good.filter(c => c.accuracy >= 80).map(c => c.tpf), 1);
  return {x: [right / 3, right * 1.1], y: [Math.max(floor(low), 70), 100]};
}
const x = v => LEFT + (WIDTH - LEFT - 16) * (Math.log2(v) - Math.log2(view.x[0])) / (Math.log2(view.x[1]) - Math.log2(view.x[0]));
const y = v => TOP + (HEIGHT - TOP - 46) * (view.y[1] - v) / (view.y[1] - view.y[0]);
const bottom = () => HEIGHT - 46;
function marker(kind, cx, cy, fill) {
  if (kind === "star") {
    const points = [...Array(10).keys()].map(i => { const r = i % 2 ? 4 : 9, a = Math.PI * (i / 5 - .5);
      return `${cx + r * Math.cos(a)},${cy + r * Math.sin(a)}`; });
    return html`<polygon points="${points.join(" ")}" fill="${fill}" stroke="var(--card)" stroke-width="1.5"/>`;
  }
  return html`<circle cx="${cx}" cy="${cy}" r="4.5" fill="${fill}" stroke="var(--card)" stroke-width="1.5"/>`;
}
function draw() {
  for (const b of document.querySelectorAll("#tasks button")) b.setAttribute("aria-pressed", b.dataset.task === task);
  view = frame();
  $("zoom").setAttribute("aria-pressed", zoomed);
  const out = [];
  const step = view.y[1] - view.y[0] > 50 ? 20 : view.y[1] - view.y[0] > 20 ? 10 : 5;
  for (let v = view.y[1]; v >= view.y[0]; v -= step)
    out.push(html`<line class="grid" x1="${LEFT}" x2="${WIDTH - 16}" y1="${y(v)}" y2="${y(v)}"/><text x="${LEFT - 8}" y="${y(v) + 4}" text-anchor="end">${v}</text>`);
  for (const v of data.ticks.filter(v => v >= view.x[0] && v <= view.x[1] && (zoomed || Number.isInteger(Math.log2(v)))))
    out.push(html`<line class="grid" x1="${x(v)}" x2="${x(v)}" y1="${TOP}" y2="${bottom()}"/><text x="${x(v)}" y="${bottom() + 18}" text-anchor="middle">${v}</text>`);
  out.push(html`<text x="${(LEFT + WIDTH) / 2}" y="${HEIGHT - 8}" text-anchor="middle">tokens per forward (up to the stop token)</text>`);
  out.push(html`<text transform="translate(12 ${HEIGHT / 2}) rotate(-90)" text-anchor="middle">accuracy, %</text>`);
  const series = [];
  for (const group of data.groups) for (const family of data.families.filter(f => f.group === group.name && !hidden.has(f.name))) {
    const cells = family.points.map(p => p.cells[task]), c = colour(group.name);
    series.push(html`<g class="series" data-family="${family.name}"><polyline class="curve" style="stroke:${c}" points="${cells.map(p => `${x(p.tpf)},${y(p.accuracy)}`).join(" ")}"/>${
      cells.map((p, i) => html`<g data-point="${i}">${marker("dot", x(p.tpf), y(p.accuracy), c)}</g>`)}</g>`);
  }
  data.oracles.forEach((o, i) => series.push(html`<g data-oracle="${i}">${marker("star", x(o.cells[task].tpf), y(o.cells[task].accuracy), colour(o.group))}</g>`));
  put($("chart"), html`<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label="accuracy against tokens per forward, ${words(task)}">${out}
    <clipPath id="frame"><rect x="${LEFT - 8}" y="0" width="${WIDTH - LEFT}" height="${bottom() + 6}"/></clipPath><g clip-path="url(#frame)">${series}</g></svg>`);
  for (const g of document.querySelectorAll("[data-point]")) {
    const name = g.parentNode.dataset.family, p = data.families.find(f => f.name === name).points[g.dataset.point];
    hover(g, () => html`<b>${p.spec}</b><br>${numbers(p.cells[task])}`, name);
  }
  for (const g of document.querySelectorAll("[data-oracle]")) {
    const o = data.oracles[g.dataset.oracle];
    hover(g, () => html`<b>oracle over ${o.of}</b><br>${numbers(o.cells[task])}`, null);
  }
}
const numbers = c => html`${fixed(c.accuracy, 1)} % right [${fixed(c.low, 1)}, ${fixed(c.high, 1)}], n = ${c.n}<br>${fixed(c.tpf)} tokens per forward${
  c.canvases_per_pass === 1 ? "" : `, ${fixed(c.canvases_per_pass, 1)} canvases per pass`}<br>${
  fixed(c.drafter_forwards)} drafter and ${fixed(c.verifier_forwards)} verifier passes`;
function hover(element, content, name) {
  element.onmousemove = e => { const tip = $("tip"); put(tip, content()); tip.style.display = "block";
    tip.style.left = Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 10) + "px"; tip.style.top = e.clientY + 14 + "px"; };
  element.onmouseenter = () => { if (name) focus(name); };
  element.onmouseleave = () => { $("tip").style.display = "none"; focus(null); };
}
function focus(name) {
  for (const g of document.querySelectorAll(".series")) g.classList.toggle("dim", name !== null && g.dataset.family !== name);
}

function table(id, header, rows) {
  const element = $(id), state = {column: -1, down: true};
  const text = cell => Array.isArray(cell) ? cell[0] : cell, value = cell => Array.isArray(cell) ? cell[1] : cell;
  const show = () => {
    put(element, html`<thead><tr>${header.map((h, i) => html`<th${i === state.column ? html` data-sorted="${state.down ? "↓" : "↑"}"` : ""}>${h}</th>`)}</tr></thead>
      <tbody>${rows.map(r => html`<tr>${r.map(c => html`<td>${text(c)}</td>`)}</tr>`)}</tbody>`);
    element.querySelectorAll("th").forEach((th, i) => th.onclick = () => {
      state.down = state.column === i ? !state.down : true; state.column = i;
      const key = r => { const v = value(r[i]); return v === null ? -Infinity : v; };
      rows.sort((a, b) => (key(a) > key(b) ? 1 : key(a) < key(b) ? -1 : 0) * (state.down ? -1 : 1)); show(); });
  };
  show();
}
const named = (spec, group) => [html`<span class="dot" style="background:${colour(group)}"></span><code>${spec}</code>`, spec];
const number = (v, d = 2) => [fixed(v, d), v === undefined ? null : v];
const speed = c => c ? [fixed(c.tpf) + (c.canvases_per_pass === 1 ? "" : ` (${fixed(c.canvases_per_pass, 1)} canvases)`), c.tpf] : number(null);
table("families", ["family", ...data.targets.map(t => `PB${t}`), "AUP", "most accurate", "accuracy, %", "tokens / forward"], data.families
  .map(f => [named(f.name, f.group), ...f.pbx.map(v => number(v)), number(f.aup, 0), [html`<code>${f.best}</code>`, f.best], number(f.best_cell.accuracy, 1), speed(f.best_cell)])
  .sort((a, b) => b[data.targets.length + 1][1] - a[data.targets.length + 1][1]));
table("settings", ["strategy", "accuracy, %", "95 %", "strict, %", "tokens / forward", "drafter passes", "verifier passes", "mean of ratios", "ratio of means", "ms"],
  data.families.flatMap(f => f.points.map(p => { const c = p.cells[MEAN]; return [named(p.spec, f.group), number(c.accuracy, 1), [`${fixed(c.low, 1)} – ${fixed(c.high, 1)}`, c.low],
    number(c.strict, 1), speed(c), number(c.drafter_forwards), number(c.verifier_forwards), number(c.tps_mean_ratio), number(c.tps_ratio_of_means), number(1000 * c.seconds, 1)]; })));
const side = s => s ? [html`<code>${s.spec}</code> · ${fixed(s.accuracy, 1)} %`, s.accuracy] : ["none", null];
const bold = v => [v === null ? "–" : html`<b>${fixed(v)}</b>`, v], passes = s => number(s && s.verifier_forwards);
const some = data.equal.some(e => e.checked), where = (there, cells) => there ? cells : [];
table("equal", ["task", "one at a time, %", "fastest APD", "tokens / forward", "verifier passes", ...where(some, ["fastest checked", "tokens / forward", "verifier passes"]),
  "fastest any-order rival", "tokens / forward", "APD ÷ rival", ...where(some, ["checked ÷ rival"])], data.equal.map(e =>
  [[words(e.task), e.task], number(e.reference, 1), side(e.apd), speed(e.apd), passes(e.apd), ...where(some, [side(e.checked), speed(e.checked), passes(e.checked)]),
   side(e.rival), speed(e.rival), bold(e.ratio), ...where(some, [bold(e.checked_ratio)])]));
const heat = c => [html`<span title="n = ${c.n}${c.canvases_per_pass === 1 ? "" : `, ${fixed(c.canvases_per_pass, 1)} canvases per pass`}" style="display:block;border-radius:5px;padding:1px 3px;background:color-mix(in srgb, color-mix(in srgb, light-dark(#16a34a, #22c55e) ${Math.round(c.accuracy)}%, light-dark(#dc2626, #ef4444)) 24%, transparent)">${fixed(c.accuracy, 0)}<br><span class="small" style="opacity:.75">${fixed(c.tpf, 1)}</span></span>`, c.accuracy];
table("heat", ["setting", ...data.tasks.map(words)], data.families.map(f => [named(f.pick, f.group), ...data.tasks.map(t => heat(f.points.find(p => p.spec === f.pick).cells[t]))]));

(function map() {
  const w = 640, h = 320, all = data.map.flatMap(s => s.tasks), ys = all.map(m => m.y);
  if (!all.length) { $("map").textContent = "Needs confidence top-k with blocks of several lengths: --strategies all."; return; }
  const deep = Math.max(-Math.min(...ys, 0), 1), lo = -1.15 * deep, hi = .3 * deep, far = 1.12 * Math.max(...all.map(m => m.x));
  const px = v => 56 + (w - 70) * v / far, py = v => 10 + (h - 56) * (hi - v) / (hi - lo);
  const out = [];
  const step = Math.max(1, Math.round((hi - lo) / 5));
  for (let v = 0; v > lo; v -= step) out.push(html`<line class="grid" x1="56" x2="${w - 10}" y1="${py(v)}" y2="${py(v)}"/><text x="48" y="${py(v) + 4}" text-anchor="end">${v}</text>`);
  for (let v = 0; v <= far; v += 2) out.push(html`<text x="${px(v)}" y="${h - 28}" text-anchor="middle">${v}</text>`);
  out.push(html`<text x="${w / 2}" y="${h - 8}" text-anchor="middle">tokens per step the task puts up with (Σ k·accuracy / Σ accuracy)</text><text transform="translate(12 ${h / 2 - 15}) rotate(-90)" text-anchor="middle">points per doubling</text>`);
  for (const s of data.map) {
    const right = s.x < far * .55;
    for (const m of s.tasks) out.push(marker("dot", px(m.x), py(m.y), "var(--accent)"));
    s.tasks.forEach((m, i) => out.push(html`<text x="${px(s.x) + (right ? 12 : 4)}" y="${py(s.y) + (right ? 4 + 14 * (i - (s.tasks.length - 1) / 2) : 20 + 14 * i)}" text-anchor="${right ? "start" : "end"}" style="fill:var(--ink)">${words(m.task)}</text>`));
  }
  put($("map"), html`<svg viewBox="0 0 ${w} ${h}">${out}</svg>`);
})();
draw();
