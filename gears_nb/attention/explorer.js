// Five views of a trained model, drawn from plain arrays. The same file runs in JupyterLab, in voila and in a page without a kernel.
// Notebook nbs/attention/06_widgets.ipynb explains it; nbs/attention/05_views.ipynb makes the payload and computes the same marks in Python.
//
//   mount(el, payload, state, onState) -> { update(payload, state), destroy() }
//
// el        an element to draw into; a child of class "gears-explorer" is made, and what it shows is kept at child.__gears
// payload   { view, title, labels, minisets: { label: arrays and words }, themes }; labels may name minisets that are not there yet
// state     plain JSON; onState(state) is told of every change that the reader makes
// Plotly    is found at globalThis.__gears_plotly; nothing is ever fetched from a network

// ---- 1. Arrays ------------------------------------------------------------------------------------------------------------------------------------

const TYPES = { float32: Float32Array, float64: Float64Array, int32: Int32Array, uint16: Uint16Array, uint8: Uint8Array };

/** The numbers of a packed array as a typed array, kept beside it for the next call. Bytes are a view of a larger buffer, from the kernel or from a page. */
function numbers(packed) {
  if (!packed.numbers) {
    const { buffer, byteOffset, byteLength } = packed.bytes;
    const a = packed.numbers = new TYPES[packed.dtype](new Uint8Array(buffer, byteOffset, byteLength).slice().buffer);   // aligned for any type
    if (packed.changes) for (let i = a.length / packed.shape[0]; i < a.length; i++) a[i] += a[i - a.length / packed.shape[0]];   // whole numbers of a type wrap round
  }
  return packed.numbers;
}

/** Rows of an (n, 2) array as { x, y } lists. */
function columns(packed, offset = 0, n = packed.shape[packed.shape.length - 2]) {
  const a = numbers(packed), x = new Array(n), y = new Array(n);
  for (let i = 0; i < n; i++) { x[i] = a[2 * (offset + i)]; y[i] = a[2 * (offset + i) + 1]; }
  return { x, y };
}

const row = (packed, i) => Array.from(numbers(packed).subarray(i * packed.shape[1], (i + 1) * packed.shape[1]));
const range = n => Array.from({ length: n }, (_, i) => i);
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
const percent = v => (v === null ? "not known" : (100 * v).toFixed(1) + " %");

// ---- 2. Marks: what a view shows, as in attention.views -------------------------------------------------------------------------------------------

const TOP = 10, STRONG = 5, SHARE = 0.9, MOST = 40, NEIGHBOURS = 10;

/** Value of a term on edge e of a cell: from the numbers that came, or from what it is a multiple of. */
function termValue(graph, name, query, e, recycle, head) {
  if (name in graph.values) {
    const p = graph.values[name], [R, H, E] = p.shape;
    return p.low + p.step * numbers(p)[(Math.min(recycle, R - 1) * H + Math.min(head, H - 1)) * E + e];
  }
  const { of, slope } = graph.derived[name], factor = slope[recycle][head];
  if (of === "gate") return factor * numbers(graph.gate)[e];
  const x = numbers(graph.layouts), first = 2 * recycle * graph.layouts.shape[1], to = numbers(graph.col)[e];
  const dx = x[first + 2 * query] - x[first + 2 * to], dy = x[first + 2 * query + 1] - x[first + 2 * to + 1];
  return factor * (dx * dx + dy * dy);
}

/** Columns and values of the edges of a cell, itself left out. The order of the sums is that of Python, so the numbers are the same to the last bits. */
function rowValues(graph, query, term, recycle, head) {
  const [a, b] = numbers(graph.indptr).subarray(query, query + 2), col = numbers(graph.col), total = new Float64Array(b - a), level = new Float64Array(b - a);
  const heads = head === "mean" ? range(graph.heads) : [head], softmax = term === "attention" && "attention" in graph.derived;
  const names = softmax || term === "total" ? graph.terms : [term];
  for (const h of heads) {
    for (let e = a; e < b; e++) { level[e - a] = 0; for (const name of names) level[e - a] += termValue(graph, name, query, e, recycle, h); }
    if (softmax) {
      const most = level.reduce((m, v) => Math.max(m, v), -Infinity);
      let sum = 0;
      for (let i = 0; i < level.length; i++) sum += level[i] = Math.exp(level[i] - most);
      for (let i = 0; i < level.length; i++) level[i] /= sum;
    }
    for (let i = 0; i < level.length; i++) total[i] += level[i];
  }
  const out = { col: [], value: [] };
  for (let e = a; e < b; e++) if (col[e] !== query) { out.col.push(col[e]); out.value.push(total[e - a] / heads.length); }
  return out;
}

/** All edges in falling order of value, ties by column. */
function ranked({ col, value }) {
  const order = range(col.length).sort((i, j) => value[j] - value[i] || col[i] - col[j]);
  return { cols: order.map(i => col[i]), values: order.map(i => value[i]) };
}

function strongest(edges, k) {
  const { cols, values } = ranked(edges);
  return { cols: cols.slice(0, k), values: values.slice(0, k) };
}

/** How many of the logits gate[a:b], falling, are kept before they hold SHARE of softmax(beta g). */
function kept(gate, a, b, beta) {
  let total = 0, before = 0, count = 0;
  for (let e = a; e < b; e++) total += Math.exp(beta * (gate[e] - gate[a]));
  for (let e = a; e < b && before < SHARE * total; e++, count++) before += Math.exp(beta * (gate[e] - gate[a]));
  return count;
}

/** Candidates of each cell, itself left out, the highest logit first; kept beside the data for the next call. */
function rankedCandidates(data) {
  if (!data.ranked) {
    const from = numbers(data.indptr), to = numbers(data.col), g = numbers(data.gate), out = { indptr: [0], col: [], gate: [], hit: [] };
    for (let i = 0; i < data.n; i++) {
      const mine = range(from[i + 1] - from[i]).map(e => from[i] + e).filter(e => to[e] !== i).sort((a, b) => g[b] - g[a] || to[a] - to[b]), near = new Set(row(data.near, i));
      for (const e of mine) { out.col.push(to[e]); out.gate.push(g[e]); out.hit.push(Number(near.has(to[e]))); }
      out.indptr.push(out.col.length);
    }
    data.ranked = out;
  }
  return data.ranked;
}

/** Per cell: first candidate, and how many the rule keeps without a bound by k. */
function keptRows(data, beta) {
  const { indptr, gate } = rankedCandidates(data);
  return range(data.n).map(i => [indptr[i], kept(gate, indptr[i], indptr[i + 1], beta)]);
}

function countKept(data, rows, k) {
  const { hit } = rankedCandidates(data), share = (part, whole) => (data.known && whole ? part / whole : null);
  let edges = 0, hits = 0;
  for (const [first, many] of rows) {
    const m = Math.min(many, k);
    edges += m;
    for (let e = first; e < first + m; e++) hits += hit[e];
  }
  const wanted = data.near.shape[0] * data.near.shape[1];
  const possible = hit.reduce((a, b) => a + b, 0);
  return { edges, hits: data.known ? hits : null, precision: share(hits, edges), recall: share(hits, wanted), ceiling: share(possible, wanted) };
}

const MARKS = {
  attention(data, s) {
    const top = strongest(rowValues(data.graphs[s.graph], s.query, s.term, s.recycle, s.head), TOP);
    const neighbours = row(data.near, s.query);
    return { ...top, neighbours, hits: data.known ? top.cols.filter(c => neighbours.includes(c)).length : null };
  },
  recycles(data, s) {
    const g = data.graphs[s.graph], r = s.recycle;
    const top = r ? strongest(rowValues(g, s.query, "attention", r - 1, "mean"), STRONG) : { cols: [], values: [] };
    const place = Array.from(numbers(g.layouts).subarray(2 * (r * data.n + s.query), 2 * (r * data.n + s.query) + 2));
    return { ...top, place, step: r ? g.step[r - 1] : null, energy: g.energy ? g.energy[r] : null };
  },
  gate(data, s) {
    const rows = keptRows(data, s.beta), [first, many] = rows[s.query];
    const cols = rankedCandidates(data).col.slice(first, first + Math.min(many, s.k));
    return { ...countKept(data, rows, s.k), cols, neighbours: row(data.near, s.query) };
  },
  reconstruction(data, s) {
    const colour = data.colours.find(c => c.name === s.colour), selected = [...new Set(s.selected)].sort((a, b) => a - b);
    const out = { selected, mean: null, count: null };
    if (selected.length && colour.kind === "number") {
      const v = selected.map(i => numbers(colour.values)[i]).filter(Number.isFinite);
      out.mean = v.length ? v.reduce((a, b) => a + b, 0) / v.length : null;
    } else if (selected.length && colour.kind === "category") {
      out.count = {};
      const codes = selected.map(i => numbers(colour.values)[i]);
      colour.levels.forEach((level, i) => { if (codes.includes(i)) out.count[level] = codes.filter(c => c === i).length; });
    }
    return out;
  },
  distortion(data, s) {
    const v = numbers(data.stretch)[s.a * data.groups + s.b], group = numbers(data.group);
    return { stretch: Number.isFinite(v) ? v : null, cells: [s.a, s.b].map(g => range(data.n).filter(i => group[i] === g)) };
  },
};

// ---- 3. State: what the reader chose, made to fit the record, as in attention.views.fit_state -----------------------------------------------------

function start(view, data) {
  if (view === "attention" || view === "recycles") {
    const graph = Object.keys(data.graphs)[0], last = data.graphs[graph].recycles - (view === "attention" ? 1 : 0);
    return { graph, recycle: last, ...(view === "attention" ? { head: "mean", term: "attention" } : {}), query: data.query };
  }
  if (view === "gate") return { beta: data.beta, k: NEIGHBOURS, show: "all", query: data.query };
  return view === "reconstruction" ? { colour: "place", selected: [] } : { a: data.worst[0], b: data.worst[1] };
}

function fitState(view, data, state) {
  const s = { ...start(view, data), ...state };
  const choose = (key, allowed, otherwise) => { if (!allowed.includes(s[key])) s[key] = otherwise; };
  const bound = (key, low, high) => { s[key] = clamp(s[key], low, high); };
  if (view === "attention" || view === "recycles") {
    choose("graph", Object.keys(data.graphs), Object.keys(data.graphs)[0]);
    bound("recycle", 0, data.graphs[s.graph].recycles - (view === "attention" ? 1 : 0));
  }
  if (view === "attention") {
    choose("head", ["mean", ...range(data.graphs[s.graph].heads)], "mean");
    choose("term", ["attention", "total", ...data.graphs[s.graph].terms], "attention");
  }
  if (view === "gate") { bound("beta", 0, 4); bound("k", 1, MOST); choose("show", ["all", "query"], "all"); }
  if ("query" in s && !(Number.isInteger(s.query) && s.query >= 0 && s.query < data.n)) s.query = data.query;
  if (view === "reconstruction") {
    choose("colour", data.colours.map(c => c.name), "place");
    s.selected = s.selected.filter(i => i >= 0 && i < data.n);
  }
  if (view === "distortion") { bound("a", 0, data.groups - 1); bound("b", 0, data.groups - 1); }
  return s;
}

// ---- 4. Controls: native elements with labels -----------------------------------------------------------------------------------------------------

const TERM_NAMES = { attention: "attention", total: "sum of all terms", qk: "content (qk)", gate: "gate", pair: "pair", geo: "geometry (geo)" };
const GRAPH_NAMES = { "H-gate": "own graph (H-gate)", "T-edge": "true edges (T-edge)" };
const SIGNS = { attention: "share of attention", total: "logit", qk: "logit", gate: "logit", pair: "logit", geo: "logit" };

const select = (key, label, options) => ({ key, label, kind: "select", options });
const slider = (key, label, min, max, step, text) => ({ key, label, kind: "range", min, max, step, text });
const button = (key, text) => ({ key, label: "", kind: "button", text });
const graphChoice = data => select("graph", "laid out on", Object.keys(data.graphs).map(g => [g, GRAPH_NAMES[g] || g]));
const recycleSlider = (label, R, first) => slider("recycle", label, 0, R - 1 + first, 1, v => (first && v === 0 ? "first guess" : `${v + 1 - first} of ${R}`));
const queryChoice = data => [{ key: "query", label: "query cell", kind: "number", min: 0, max: data.n - 1 },
  select("rule", "chosen by rule", [["", "by hand"], ...Object.entries(data.rules).map(([name, cell]) => [cell, name])])];

/** What a view lets the reader choose. */
const CONTROLS = {
  attention(data, s) {
    const g = data.graphs[s.graph], heads = [["mean", "mean of all"], ...range(g.heads).map(h => [h, `head ${h + 1}`])];
    const terms = ["attention", "total", ...g.terms].map(t => [t, TERM_NAMES[t]]);
    return [graphChoice(data), recycleSlider("recycle", g.recycles, 0), select("head", "head", heads), select("term", "show", terms), ...queryChoice(data)];
  },
  recycles: (data, s) => [graphChoice(data), button("play", "play"), recycleSlider("after recycle", data.graphs[s.graph].recycles, 1), ...queryChoice(data)],
  gate: data => [slider("beta", "weight β", 0, 4, 0.05, v => v.toFixed(2) + (Math.abs(v - data.beta) < 0.026 ? " (the model's)" : "")),
    slider("k", "at most k", 1, MOST, 1, v => `${v} edges per cell`), select("show", "edges of", [["all", "all cells"], ["query", "the query cell"]]), ...queryChoice(data)],
  reconstruction: data => [select("colour", "colour", data.colours.map(c => [c.name, c.name])), button("clear", "clear selection")],
  distortion: data => ["a", "b"].map((key, i) => slider(key, `group ${"AB"[i]}`, 0, data.groups - 1, 1, v => `${v + 1} of ${data.groups}`)),
};

/** The element of a control, and a function that shows a value in it. */
function makeControl(c, id, set) {
  const box = document.createElement("div"), label = document.createElement("label");
  box.className = "gears-control";
  let el;
  if (c.kind === "button") {
    el = document.createElement("button");
    el.type = "button";
    el.textContent = c.text;
    el.addEventListener("click", () => set(c.key, null));
  } else if (c.kind === "select") {
    el = document.createElement("select");
    for (const [value, text] of c.options) el.append(new Option(text, JSON.stringify(value)));
    el.addEventListener("change", () => set(c.key, JSON.parse(el.value)));
  } else {
    el = document.createElement("input");
    Object.assign(el, { type: c.kind, min: c.min, max: c.max, step: c.step || 1 });
    el.addEventListener(c.kind === "range" ? "input" : "change", () => { if (el.value !== "" && el.checkValidity()) set(c.key, Number(el.value)); });
  }
  el.id = id;
  el.dataset.gearsControl = c.key;
  el.dataset.lmSuppressShortcuts = "true";                             // JupyterLab would take arrow keys and letters for its own shortcuts
  label.htmlFor = id;
  label.textContent = c.label;
  box.append(...(c.label ? [label] : []), el);
  const out = c.kind === "range" ? box.appendChild(document.createElement("output")) : null;
  if (out) out.htmlFor = id;
  const show = value => {
    if (c.kind === "select") el.value = JSON.stringify(value);
    else if (c.kind !== "button" && el.value !== String(value)) el.value = value;
    if (out) { out.textContent = c.text(value); el.setAttribute("aria-valuetext", out.textContent); }
  };
  return { box, el, show };
}

// ---- 5. Look: colours of the page the view is on, and the parts that all figures share ------------------------------------------------------------

const OKABE_ITO = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"];
const VIRIDIS = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"];

/** Dark or light: JupyterLab and voila say so on the body, VS Code too; otherwise the reader's system decides. */
function isDark() {
  const { jpThemeLight, vscodeThemeKind } = document.body.dataset;
  if (jpThemeLight !== undefined) return jpThemeLight === "false";
  if (vscodeThemeKind !== undefined) return vscodeThemeKind.includes("dark");
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

const scale = colours => colours.map((c, i) => [i / (colours.length - 1), c]);
const channels = c => [1, 3, 5].map(i => parseInt(c.slice(i, i + 2), 16));

/** Colour at t in 0..1 along a list of colours. */
function mix(colours, t) {
  const u = clamp(t, 0, 1) * (colours.length - 1), i = Math.min(Math.floor(u), colours.length - 2), a = channels(colours[i]), b = channels(colours[i + 1]);
  return "rgb(" + a.map((v, j) => Math.round(v + (u - i) * (b[j] - v))).join(",") + ")";
}

const veil = (colour, alpha) => `rgba(${channels(colour).join(",")},${alpha.toFixed(2)})`;

/** Colours that say where on a map a cell is: four corners, mixed between. */
function placeColours({ x, y }) {
  const corners = ["#0072B2", "#E69F00", "#009E73", "#CC79A7"].map(channels), low = v => Math.min(...v), span = v => Math.max(...v) - low(v) || 1;
  const [x0, dx, y0, dy] = [low(x), span(x), low(y), span(y)];
  return x.map((_, i) => {
    const u = (x[i] - x0) / dx, v = (y[i] - y0) / dy, w = [(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v];
    return "rgb(" + [0, 1, 2].map(j => Math.round(w.reduce((sum, a, c) => sum + a * corners[c][j], 0))).join(",") + ")";
  });
}

const FONT = "system-ui, 'Segoe UI', Roboto, sans-serif";

const baseLayout = (look, title, more) => ({
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: FONT, size: 12, color: look.ink }, showlegend: false, hovermode: "closest",
  hoverlabel: { bgcolor: look.paper, bordercolor: look.line, font: { color: look.ink, size: 12 } }, modebar: { bgcolor: "rgba(0,0,0,0)", color: look.soft, activecolor: look.accent },
  title: { text: title, x: 0.02, xanchor: "left", font: { size: 13 } }, ...more,
});

/** A map: equal axes without ticks, and a bar of one RMS radius. `frame`: places that must fit in; maps with the same frame have the same scale. */
function mapLayout(look, title, frame, more = {}) {
  const [left, right, low, high] = [Math.min(...frame.x), Math.max(...frame.x), Math.min(...frame.y), Math.max(...frame.y)];
  const pad = 0.04 * (right - left), tall = high - low || 1, bar = low - 0.09 * tall;
  return baseLayout(look, title, {
    margin: { l: 12, r: 12, t: 34, b: 14 }, dragmode: "pan",
    xaxis: { visible: false, range: [left - pad, right + pad] }, yaxis: { visible: false, scaleanchor: "x", range: [bar - 0.06 * tall, high + 0.06 * tall] },
    shapes: [{ type: "line", x0: left, x1: left + 1, y0: bar, y1: bar, line: { color: look.ink, width: 2 } }],
    annotations: [{ x: left + 0.5, y: bar, text: "1 RMS radius", showarrow: false, yanchor: "bottom", font: { size: 10, color: look.soft } }], ...more,
  });
}

function chartLayout(look, title, x, y, { xaxis, yaxis, ...more } = {}) {
  const axis = (text, given) => ({ title: { text, font: { size: 11 }, standoff: 6 }, tickfont: { size: 10, color: look.soft }, gridcolor: look.line, linecolor: look.line,
    zeroline: false, automargin: true, ...given });
  return baseLayout(look, title, { margin: { l: 48, r: 14, t: 34, b: 40 }, xaxis: axis(x, { showgrid: false, ...xaxis }), yaxis: axis(y, yaxis), ...more });
}

const colourBar = (look, more) => ({ thickness: 10, len: 0.6, outlinewidth: 0, tickfont: { size: 10, color: look.soft }, ...more });
const together = (...places) => ({ x: places.flatMap(p => p.x), y: places.flatMap(p => p.y) });
const dotSize = n => (n > 2000 ? 4 : n > 800 ? 5 : n > 250 ? 6.5 : 8);
const dots = (x, y, marker, more) => ({ type: "scatter", mode: "markers", hoverinfo: "skip", x, y, marker, ...more });
const lines = (x, y, colour, width) => ({ type: "scatter", mode: "lines", hoverinfo: "skip", x, y, line: { color: colour, width } });

/** All cells of a map as one trace with a name, so that a click tells a cell number. */
const cells = (places, marker, text, more) => dots(places.x, places.y, { size: dotSize(places.x.length), line: { width: 0 }, ...marker },
  { name: "cells", text, hoverinfo: "text", hovertemplate: "%{text}<extra></extra>", ...more });
const called = (data, i) => (data.names ? `${data.names[i]}<br>` : "") + `cell ${i}`;   // name in the table, if the record kept it, and number in the miniset
const rings = (places, list, colour, size) => dots(list.map(c => places.x[c]), list.map(c => places.y[c]), { size, color: "rgba(0,0,0,0)", line: { color: colour, width: 2 } });
const star = (places, query, look) => dots([places.x[query]], [places.y[query]], { size: 15, symbol: "star", color: look.query, line: { color: look.paper, width: 1 } });
const ray = (places, a, b, colour, width) => lines([places.x[a], places.x[b]], [places.y[a], places.y[b]], colour, width);

/** Colour and symbol of a level of a category: seven colours, then again with another symbol. */
const SYMBOLS = { circle: "●", square: "■", diamond: "◆", "triangle-up": "▲", cross: "✚" };
const levelStyle = (c, look) => (c < 0 ? [look.faint, "circle-open"] : [OKABE_ITO[c % 7], Object.keys(SYMBOLS)[Math.floor(c / 7)]]);

const where = data => (data.known ? "True places" : "Last layout (true places are not known)");
const key = (...items) => items.map(([symbol, colour, text]) => `<span style="color:${colour}">${symbol}</span> ${text}`).join("   ");

// ---- 6. Figures: { panel: { traces, layout } } from data, state and marks -------------------------------------------------------------------------

/** Smallest and largest value of a term over all candidates of the query in all recycles, of the mean or of any head: one colour scale while leafing. */
function span(graph, s) {
  let low = s.term === "attention" ? 0 : Infinity, high = -Infinity;
  for (const recycle of range(graph.recycles)) for (const head of s.head === "mean" ? ["mean"] : range(graph.heads)) {
    for (const v of rowValues(graph, s.query, s.term, recycle, head).value) { low = Math.min(low, v); high = Math.max(high, v); }
  }
  return [low, high];
}

const FIGURES = {
  attention(data, s, m, look) {
    const graph = data.graphs[s.graph], places = columns(data.places), all = ranked(rowValues(graph, s.query, s.term, s.recycle, s.head));
    const value = new Map(all.cols.map((c, i) => [c, all.values[i]])), near = new Set(m.neighbours), size = dotSize(data.n), unit = SIGNS[s.term];
    const [low, high] = span(graph, s), share = v => clamp((v - low) / (high - low || 1), 0, 1), ramp = v => mix(look.ramp, share(v));
    const tell = i => called(data, i) + (i === s.query ? ", the query" : value.has(i) ? `<br>${unit} ${value.get(i).toPrecision(3)}` : "<br>no candidate") + (near.has(i) ? "<br>true neighbour" : "");
    const each = f => range(data.n).map(f), shown = all.cols.slice(0, MOST);
    const bar = dots([null], [null], { color: [low, high], cmin: low, cmax: high, colorscale: scale(look.ramp), showscale: true,
      colorbar: colourBar(look, { title: { text: unit, side: "right", font: { size: 11 } } }) });
    const legend = key(["★", look.query, `cell ${s.query}`], ...(data.known ? [["○", look.truth, "true neighbours"]] : []));
    const limit = { type: "line", x0: m.cols.length + 0.5, x1: m.cols.length + 0.5, yref: "paper", y0: 0, y1: 1, line: { color: look.soft, width: 1, dash: "dot" } };
    return {
      map: {
        traces: [cells(places, { color: each(i => (value.has(i) ? ramp(value.get(i)) : look.faint)), size: each(i => size - (value.has(i) ? 0 : 2.5)) }, each(tell)),
          ...m.cols.map((c, i) => ray(places, s.query, c, ramp(m.values[i]), 1 + 4 * share(m.values[i]))), rings(places, m.neighbours, look.truth, size + 6), star(places, s.query, look), bar],
        layout: mapLayout(look, `${where(data)}   ${legend}`, places),
      },
      ranks: {
        traces: [{ type: "bar", x: shown.map((_, i) => i + 1), y: all.values.slice(0, MOST), customdata: shown, hovertemplate: "cell %{customdata}<br>%{y:.3g}<extra></extra>",
          marker: { color: shown.map(c => (near.has(c) ? look.truth : look.faint)), line: { width: 0 } } }],
        layout: chartLayout(look, data.known ? key(["■", look.truth, "true neighbour"], ["■", look.faint, "other candidate"]) : "Its candidates",
          "candidates, strongest first", unit, { bargap: 0.15, shapes: [limit] }),
      },
    };
  },

  recycles(data, s, m, look) {
    const g = data.graphs[s.graph], R = g.recycles, now = columns(g.layouts, s.recycle * data.n, data.n), places = columns(data.places);
    const every = columns({ ...g.layouts, shape: [(R + 1) * data.n, 2] }), frame = data.known ? together(every, places) : every;
    const colour = placeColours(places), text = range(data.n).map(i => called(data, i)), ticks = { tickvals: range(R + 1), range: [-0.3, R + 0.3] };
    const line = (x, y, at, colour) => ({ type: "scatter", mode: "lines+markers", x, y, line: { color: colour, width: 2 }, hovertemplate: "%{y:.3f}<extra></extra>",
      marker: { opacity: 1, size: x.map(r => (r === at ? 11 : 6)), color: x.map(r => (r === at ? look.query : colour)) } });
    const chart = (title, x, y, values, first, colour) => ({ traces: [line(range(values.length).map(i => i + first), values, s.recycle, colour)],
      layout: chartLayout(look, title, x, y, { xaxis: ticks, yaxis: { rangemode: "tozero" } }) });
    const rays = m.cols.map((c, i) => ray(now, s.query, c, look.ink, 1 + 3 * m.values[i] / (m.values[0] || 1)));
    const figures = {
      map: { traces: [cells(now, { color: colour }, text), ...rays, star(now, s.query, look)], layout: mapLayout(look, s.recycle ? `Layout after recycle ${s.recycle}` : "First guess", frame) },
      truth: { traces: [cells(places, { color: colour }, text), star(places, s.query, look)], layout: mapLayout(look, "True places, the source of the colours", frame) },
      steps: chart("Step", "recycle", "RMS radii", g.step, 1, look.accent),
      energy: chart("Energy", "recycle (0: first guess)", "E_geo", g.energy || [], 0, look.truth),
    };
    if (!data.known) delete figures.truth;
    if (!g.energy) delete figures.energy;
    return figures;
  },

  gate(data, s, m, look) {
    const places = columns(data.places), rows = keptRows(data, s.beta), { col, hit } = rankedCandidates(data), good = { x: [], y: [] }, bad = { x: [], y: [] };
    rows.forEach(([first, many], i) => {
      if (s.show === "query" && i !== s.query) return;
      for (let e = first; e < first + Math.min(many, s.k); e++) {
        const to = hit[e] || !data.known ? good : bad;
        to.x.push(places.x[i], places.x[col[e]], null);
        to.y.push(places.y[i], places.y[col[e]], null);
      }
    });
    const crowd = Math.max(1, (good.x.length + bad.x.length) / 3000), text = range(data.n).map(i => called(data, i));   // many edges are drawn fainter
    const map = {
      traces: [lines(bad.x, bad.y, veil(look.wrong, Math.max(0.12, 0.5 / crowd)), 1),
        lines(good.x, good.y, veil(data.known ? look.truth : look.accent, Math.max(0.5, 0.9 / Math.sqrt(crowd))), 1.4),
        cells(places, { color: look.soft, size: dotSize(data.n) - 2 }, text), rings(places, m.neighbours, look.truth, dotSize(data.n) + 5), star(places, s.query, look)],
      layout: mapLayout(look, data.known ? `${where(data)}   ` + key(["━", look.truth, "to a true neighbour"], ["━", look.wrong, "elsewhere"]) : where(data), places),
    };
    if (!data.known) return { map };
    const curve = range(MOST).map(i => countKept(data, rows, i + 1)), tip = "recall %{x:.3f}<br>precision %{y:.3f}<extra></extra>";
    const along = dots(curve.map(c => c.recall), curve.map(c => c.precision), { size: 5, color: look.accent },
      { mode: "lines+markers", text: range(MOST).map(i => `k = ${i + 1}`), line: { color: look.accent, width: 2 }, hoverinfo: "all", hovertemplate: "%{text}<br>" + tip });
    const point = dots([m.recall], [m.precision], { size: 13, color: look.query, line: { color: look.paper, width: 1 } }, { hoverinfo: "all", hovertemplate: tip });
    const ceiling = { shapes: [{ type: "line", x0: m.ceiling, x1: m.ceiling, y0: 0, y1: 1, line: { color: look.soft, width: 1, dash: "dot" } }],
      annotations: [{ x: m.ceiling, y: 0.04, text: "all candidates", showarrow: false, xanchor: "right", xshift: -4, font: { size: 10, color: look.soft } }] };
    const axes = { xaxis: { range: [0, 1.02], showgrid: true }, yaxis: { range: [0, 1.02] } };
    return { map, curve: { traces: [along, point], layout: chartLayout(look, `k from 1 to ${MOST} at this β`, "recall", "precision", { ...axes, ...ceiling }) } };
  },

  reconstruction(data, s, m, look) {
    const colour = data.colours.find(c => c.name === s.colour), v = colour.values && numbers(colour.values);
    const names = ["true", "predicted"].filter(n => data.maps[n]), frame = together(...names.map(n => columns(data.maps[n]))), title = { true: "True places" };
    title.predicted = data.known ? "Reconstructed, turned onto the truth" : "Reconstructed";
    const value = { place: null, number: i => (Number.isFinite(v[i]) ? v[i].toPrecision(3) : "not known"), category: i => colour.levels[v[i]] ?? "not known" }[colour.kind];
    const tell = i => (value ? `<br>${colour.name}: ${value(i)}` : "");
    const marker = last => {
      if (colour.kind === "place") return { color: placeColours(columns(data.maps[names[0]])) };
      if (colour.kind === "category") return { color: Array.from(v, c => levelStyle(c, look)[0]), symbol: Array.from(v, c => levelStyle(c, look)[1]) };
      const sorted = Array.from(v).filter(Number.isFinite).sort((a, b) => a - b), at = q => sorted[Math.round(q * (sorted.length - 1))];   // outliers do not set the scale
      return { color: Array.from(v), colorscale: scale(VIRIDIS), cmin: at(0.01), cmax: at(0.99), showscale: last, colorbar: colourBar(look) };
    };
    const chosen = { selectedpoints: m.selected.length ? m.selected : null, selected: { marker: { opacity: 1 } }, unselected: { marker: { opacity: 0.1 } } };
    return Object.fromEntries(names.map((name, i) => [name, {
      traces: [cells(columns(data.maps[name]), marker(i === names.length - 1), data.names.map((cell, j) => cell + tell(j)), chosen)],
      layout: mapLayout(look, title[name], frame, { dragmode: "lasso", selectionrevision: JSON.stringify(m.selected) }),
    }]));
  },

  distortion(data, s, m, look) {
    const k = data.groups, v = numbers(data.stretch), rows = f => range(k).map(i => range(k).map(j => f(v[i * k + j]))), z = rows(Math.log2), group = numbers(data.group);
    const most = clamp(Math.max(...z.flat().filter(Number.isFinite).map(Math.abs)), 0.3, 2), ticks = [0.25, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 4], fourth = range(k).filter(i => i % 4 === 0);
    const side = { tickvals: fourth, ticktext: fourth.map(i => i + 1), constrain: "domain" }, frame = together(columns(data.maps.true), columns(data.maps.predicted));
    const paintOf = g => (g === s.a ? look.query : g === s.b ? look.accent : look.faint), legend = key(["●", look.query, "A"], ["●", look.accent, "B"]);
    const map = name => ({ traces: [cells(columns(data.maps[name]), { color: Array.from(group, paintOf), size: dotSize(data.n) + 0.5 }, Array.from(group, (g, i) => `${data.names[i]}, group ${g + 1}`))],
      layout: mapLayout(look, `${name === "true" ? "True places" : "Reconstructed"}   ${legend}`, frame) });
    const frames = [[s.a, s.b], [s.b, s.a]].map(([i, j]) => ({ type: "rect", x0: j - 0.5, x1: j + 0.5, y0: i - 0.5, y1: i + 0.5, line: { color: look.ink, width: 2 } }));
    const heat = { type: "heatmap", z, zmin: -most, zmax: most, colorscale: scale(look.split), xgap: 1, ygap: 1, customdata: rows(x => x),
      hovertemplate: "stretch %{customdata:.2f}<extra></extra>", colorbar: colourBar(look, { tickvals: ticks.map(Math.log2), ticktext: ticks.map(t => "× " + t) }) };
    const axes = { xaxis: side, yaxis: { ...side, autorange: "reversed", scaleanchor: "x", showgrid: false }, shapes: frames };
    return { heat: { traces: [heat], layout: chartLayout(look, "Stretch between groups", "group B", "group A", axes) }, true: map("true"), predicted: map("predicted") };
  },
};

/** Entries of a legend below the figure, where a panel's title has no room for it: the levels of a category. */
function legendOf(view, data, s, look) {
  const colour = view === "reconstruction" && data.colours.find(c => c.name === s.colour);
  if (!colour || colour.kind !== "category") return [];
  return colour.levels.map((level, i) => { const [c, symbol] = levelStyle(i, look); return [SYMBOLS[symbol], c, level]; });
}

function legendItem([glyph, colour, text]) {
  const item = document.createElement("li"), dot = document.createElement("span");
  dot.textContent = glyph + " ";
  dot.style.color = colour;
  item.append(dot, text);
  return item;
}

// ---- 7. Words: what the figure shows, in a sentence or two; also its text alternative -------------------------------------------------------------

const RULE = "A cell keeps its candidates, the highest gate logit first, until those kept hold 90 % of softmax(βg) over its candidates, and never more than k.";

const TELL = {
  attention: (data, s, m) =>
    `Cell ${s.query}, recycle ${s.recycle + 1}, ${s.head === "mean" ? "mean of all heads" : "head " + (s.head + 1)}, ${TERM_NAMES[s.term]}: ` +
    `the ${m.cols.length} strongest candidates are drawn as edges` + (data.known ? `; ${m.hits} of them ${m.hits === 1 ? "is" : "are"} among its ${m.neighbours.length} true neighbours (ringed).` : "."),
  recycles: (data, s, m) =>
    (s.recycle ? `After recycle ${s.recycle}: cells moved by ${m.step.toFixed(3)} RMS radii in this step` : "The first guess, made without a graph") +
    (m.energy === null ? "." : `; energy ${m.energy.toFixed(3)}.`) + (m.cols.length ? ` Lines: the ${m.cols.length} cells that cell ${s.query} attended to most.` : ""),
  gate: (data, s, m) =>
    `${RULE} With β = ${s.beta.toFixed(2)} and k = ${s.k}: ${m.edges} edges` + (data.known ?
      `, precision ${percent(m.precision)}, recall ${percent(m.recall)} of the ${NEIGHBOURS} true neighbours (at most ${percent(m.ceiling)}).` : "; true places are not known."),
  reconstruction(data, s, m) {
    const levels = m.count && Object.entries(m.count).sort((a, b) => b[1] - a[1]).slice(0, 6).map(([level, n]) => `${level} ${n}`).join(", ");
    const selection = m.selected.length ? `${m.selected.length} selected${m.mean === null ? "" : `, mean ${m.mean.toPrecision(3)}`}${levels ? `: ${levels}` : ""}.` :
      "Draw around cells in one map to find them in the other; click one to select it alone.";
    return `${data.n} cells${data.n < data.of ? ` of ${data.of}` : ""}, colour: ${s.colour}. ${selection}`;
  },
  distortion: (data, s, m) =>
    (s.a === s.b ? `Within group ${s.a + 1}` : `Between groups ${s.a + 1} (A) and ${s.b + 1} (B)`) + (m.stretch === null ? " there are no distances." :
      ` predicted distances are ${m.stretch.toFixed(2)} times the true ones, both maps in unit-RMS gauge: ${Math.abs(m.stretch - 1) < 0.05 ? "faithful" : m.stretch > 1 ? "stretched" : "squeezed"}.`),
};

// ---- 8. Reader's actions on a figure --------------------------------------------------------------------------------------------------------------

/** What a click, a hover or a selection on a panel changes, as a piece of state; null: nothing. Points carry the number of their cell. */
const ACTIONS = {
  click(view, point, s) {
    if (point.data.name !== "cells") return point.data.type === "bar" ? { query: point.customdata } : null;
    if (view === "reconstruction") return { selected: s.selected.length === 1 && s.selected[0] === point.pointIndex ? [] : [point.pointIndex] };
    return "query" in s ? { query: point.pointIndex } : null;
  },
  hover(view, point) {
    return view === "distortion" && point.data.type === "heatmap" ? { a: point.y, b: point.x } : null;
  },
  select(view, points) {
    return view === "reconstruction" ? { selected: points.filter(p => p.data.name === "cells").map(p => p.pointIndex) } : null;
  },
};

// ---- 9. Mount -------------------------------------------------------------------------------------------------------------------------------------

/** Share of the width, and height in pixels, of each panel; the last two of the recycle player share a column. */
const PANELS = {
  attention: { map: [13, 470], ranks: [11, 470] },
  recycles: { map: [9, 430], truth: [9, 430], steps: [6, 210], energy: [6, 210] },
  gate: { map: [13, 470], curve: [11, 470] },
  reconstruction: { true: [12, 460], predicted: [12, 460] },
  distortion: { heat: [9, 400], true: [7.5, 400], predicted: [7.5, 400] },
};

let mounted = 0;

export function mount(el, payload, state, onState = () => {}) {
  const Plotly = globalThis.__gears_plotly, view = payload.view, root = document.createElement("section");
  const id = `gears-${++mounted}-${Math.random().toString(36).slice(2, 8)}`;      // every widget of a page may have a module of its own
  root.className = "gears-explorer";
  root.setAttribute("aria-label", payload.title);
  root.innerHTML = `<h3></h3><div class="gears-controls"></div><figure aria-labelledby="${id}-words"><div class="gears-panels"></div>` +
    `<ul class="gears-legend"></ul><figcaption id="${id}-words" aria-live="polite"></figcaption></figure>`;
  root.querySelector("h3").textContent = payload.title;
  el.append(root);

  let controls = [], built = "", timer = null, painting = false, due = null;
  const panels = {}, words = root.querySelector("figcaption"), miniset = () => payload.minisets[state.miniset];
  root.__gears = { view, state: null, marks: null, busy: false, pixel };

  /** Screen position of a cell, for tests and for teaching: where to click. */
  function pixel(cell, name = Object.keys(panels)[0]) {
    const div = panels[name], box = div.getBoundingClientRect(), { xaxis, yaxis } = div._fullLayout, cells = div.data.find(t => t.name === "cells");
    return { x: box.left + xaxis._offset + xaxis.l2p(cells.x[cell]), y: box.top + yaxis._offset + yaxis.l2p(cells.y[cell]) };
  }

  /** Controls are rebuilt only when their choices change, so that a slider in the reader's hand stays in it. */
  function buildControls(data) {
    const asked = CONTROLS[view](data, state), wanted = JSON.stringify([payload.labels, asked.map(c => [c.key, c.min, c.max, c.options])]);
    if (wanted === built) return;
    built = wanted;
    const focus = document.activeElement?.dataset?.gearsControl, holder = root.querySelector(".gears-controls");
    const list = payload.labels.length > 1 ? [select("miniset", "miniset", payload.labels.map(l => [l, l])), ...asked] : asked;
    controls = list.map(c => ({ ...c, ...makeControl(c, `${id}-${c.key}`, change) }));
    const mine = holder.contains(document.activeElement);
    holder.replaceChildren(...controls.map(c => c.box));
    if (mine) controls.find(c => c.key === focus)?.el.focus();
  }

  function change(name, value) {
    if (name === "play") return play();
    if (name === "clear") return set({ selected: [] });
    if (name === "rule") return value === "" ? null : set({ query: value });
    return set({ [name]: value });
  }

  function set(piece) {
    state = { ...state, ...piece };
    draw();
    onState(state);
  }

  function play() {
    if (timer) return stop();
    const R = miniset().graphs[state.graph].recycles;
    if (state.recycle >= R) set({ recycle: 0 });
    controls.find(c => c.key === "play").el.textContent = "pause";
    timer = setInterval(() => { set({ recycle: state.recycle + 1 }); if (state.recycle >= R) stop(); }, 900);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    const button = controls.find(c => c.key === "play");
    if (button) button.el.textContent = "play";
  }

  function panel(name) {
    if (panels[name]) return panels[name];
    const [width, height] = PANELS[view][name], div = document.createElement("div");
    Object.assign(div.dataset, { gearsView: view, gearsPanel: name });
    div.className = "gears-panel";
    div.style.height = `${height}px`;
    panels[name] = root.querySelector(".gears-panels").appendChild(div);
    return div;
  }

  /** One row of panels; step size and energy are stacked in the last column. */
  function arrange(names) {
    const stacked = names.includes("steps") && names.includes("energy"), inRow = stacked ? names.filter(n => n !== "energy") : names;
    root.querySelector(".gears-panels").style.setProperty("--gears-columns", inRow.map(n => `minmax(0, ${PANELS[view][n][0]}fr)`).join(" "));
    for (const name of names) {
      const column = inRow.indexOf(name === "energy" && stacked ? "steps" : name) + 1;
      panel(name).style.gridArea = !stacked || name === "steps" ? `1 / ${column}` : name === "energy" ? `2 / ${column}` : `1 / ${column} / 3`;
    }
  }

  function listen(div) {
    const act = (action, given) => {
      const piece = painting ? null : ACTIONS[action](view, given, state);       // what Plotly says while it is being told something is an echo
      if (piece && Object.keys(piece).some(k => JSON.stringify(piece[k]) !== JSON.stringify(state[k]))) set(piece);
    };
    div.on("plotly_click", e => act("click", e.points[0]));
    div.on("plotly_hover", e => act("hover", e.points[0]));
    div.on("plotly_selected", e => e && e.points && act("select", e.points));
    div.on("plotly_deselect", () => act("select", []));
  }

  /** State, marks, controls and words at once; the figures with the next frame, so that a slider in motion does not queue up drawings. */
  function draw() {
    const data = miniset();
    root.__gears.busy = !data;
    if (!data) {                                                       // the kernel has been asked for it
      words.textContent = `${state.miniset} is on its way.`;
      return;
    }
    state = { miniset: state.miniset, ...fitState(view, data, state) };
    const look = payload.themes[isDark() ? "dark" : "light"], marks = MARKS[view](data, state);
    buildControls(data);
    for (const c of controls) c.show(c.key === "rule" ? (Object.values(data.rules).includes(state.query) ? state.query : "") : state[c.key]);
    words.textContent = TELL[view](data, state, marks);
    root.querySelector(".gears-legend").replaceChildren(...legendOf(view, data, state, look).map(legendItem));
    root.__gears.state = state;
    root.__gears.marks = { view, ...state, ...marks };
    if (!due) root.__gears.drawn = new Promise(resolve => { due = requestAnimationFrame(() => resolve(paint())); });
  }

  async function paint() {
    due = null;
    const data = miniset();
    if (!data) return;
    const look = payload.themes[isDark() ? "dark" : "light"];
    for (const [name, colour] of Object.entries(look)) if (typeof colour === "string") root.style.setProperty(`--gears-${name}`, colour);
    root.style.colorScheme = isDark() ? "dark" : "light";
    const figures = FIGURES[view](data, state, root.__gears.marks, look);
    arrange(Object.keys(figures));
    painting = true;
    const tasks = Object.entries(figures).map(([name, { traces, layout }]) => {
      const div = panel(name), fresh = !div.on;
      layout.uirevision = state.miniset;                               // a reader's zoom stays until the cells change
      return Promise.resolve(Plotly.react(div, traces, layout, plotlyConfig(view, name))).then(() => { if (fresh) listen(div); });
    });
    painting = false;
    await Promise.all(tasks);
  }

  const dark = matchMedia("(prefers-color-scheme: dark)"), themes = new MutationObserver(draw);
  dark.addEventListener("change", draw);
  themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind"] });
  const resize = new ResizeObserver(() => root.__gears.drawn.then(() => Object.values(panels).forEach(div => div.isConnected && div.offsetWidth && Plotly.Plots.resize(div))));
  resize.observe(root);
  state = { miniset: payload.labels[0], ...state };
  draw();

  return {
    root,
    update(newPayload, newState) {
      payload = newPayload;
      state = { ...newState };
      draw();
    },
    destroy() {
      stop();
      cancelAnimationFrame(due);
      dark.removeEventListener("change", draw);
      themes.disconnect();
      resize.disconnect();
      for (const div of Object.values(panels)) Plotly.purge(div);
      root.remove();
    },
  };
}

/** Buttons of a panel: moving about on maps, selecting where selecting means something, and a picture to keep; nothing that talks to a server. */
function plotlyConfig(view, name) {
  const tools = view === "reconstruction" ? ["lasso2d", "select2d", "pan2d"] : ["pan2d", "zoom2d"], isMap = ["map", "truth", "true", "predicted"].includes(name);
  return { displaylogo: false, responsive: false, scrollZoom: isMap, doubleClick: isMap ? "reset" : false, plotlyServerURL: "",
    modeBarButtons: [isMap ? [...tools, "resetScale2d", "toImage"] : ["toImage"]], toImageButtonOptions: { filename: `gears-${view}-${name}`, scale: 2 } };
}

// ---- 10. Live widget (anywidget): the kernel hands over Plotly's source once per page -------------------------------------------------------------

/** Plotly, from the page or from the kernel. Its source is evaluated with a module of its own, so that a loader on the page does not catch it. */
function plotly(model) {
  if (globalThis.__gears_plotly) return Promise.resolve();
  globalThis.__gears_plotly_wait ??= new Promise(resolve => {
    const receive = (message, buffers) => {
      if (message.tell !== "plotly") return;
      model.off("msg:custom", receive);
      const module = { exports: {} };
      new Function("module", "exports", "define", new TextDecoder().decode(buffers[0]))(module, module.exports, undefined);
      globalThis.__gears_plotly = module.exports;
      resolve();
    };
    model.on("msg:custom", receive);
    model.send({ ask: "plotly" });
  });
  return globalThis.__gears_plotly_wait;
}

async function render({ model, el }) {
  await plotly(model);
  const told = state => { model.set("state", state); model.save_changes(); };
  const view = mount(el, model.get("payload"), model.get("state"), told), update = () => view.update(model.get("payload"), model.get("state"));
  const fromKernel = () => { if (JSON.stringify(model.get("state")) !== JSON.stringify(view.root.__gears.state)) update(); };   // not our own echo
  model.on("change:payload", update);
  model.on("change:state", fromKernel);
  return () => { model.off("change:payload", update); model.off("change:state", fromKernel); view.destroy(); };
}

export default { render };
