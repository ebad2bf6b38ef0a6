"use strict";

// The page of a diagnosis. The findings are in the HTML already; this draws the heads, the selected
// head and the depth plots. Whatever comes from the model (names, tokens) reaches the page through
// textContent only; Plotly reads its texts as pseudo-HTML, so there they are escaped by `quoted`.

const data = JSON.parse(document.getElementById("data").textContent);
const { statistics, stacks, layers, blocks, findings } = data;
const severalTexts = layers.some((layer) => layer.keys.some((head) => head.some((key) => key[2] > 0)));
const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

const quoted = (text) =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

const isKnown = (value) => value !== null && value !== undefined;

function number(value) {
  if (!isKnown(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e7)) return value.toExponential(1);
  const decimals = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : Math.abs(value) >= 0.1 ? 2 : 4;
  return value.toLocaleString("en", { maximumFractionDigits: decimals });
}

function share(value) {
  if (!isKnown(value)) return "–";
  const percent = 100 * value;
  if (percent === 0) return "0\u00a0%";
  if (percent < 0.01) return "<\u00a00.01\u00a0%";
  return `${Number(percent.toPrecision(percent < 99.95 ? 3 : 4))}\u00a0%`;
}

const isShare = (statistic) => statistic.unit === "share";
const shown = (statistic, value) => (isShare(statistic) ? share(value) : number(value));

// Where every layer is: its stack, and what it is called there.
const home = new Map();
for (const stack of stacks) {
  for (const row of stack.rows) {
    const name = /^\d/.test(row.label) ? `Layer ${row.label}` : row.label;
    home.set(row.layer, { stack, title: name });
  }
}

const valueOf = (statistic, layer, head) => layers[layer].values[statistic.name]?.[head];

function knownValues(statistic) {
  return layers.flatMap((layer) => layer.values[statistic.name] ?? []).filter(isKnown);
}

const extent = (values) => [
  values.reduce((a, b) => Math.min(a, b), Infinity),
  values.reduce((a, b) => Math.max(a, b), -Infinity),
];

// ---------------------------------------------------------------------------------------- colour

// Even steps of lightness in OKLCH, so that twice the value looks like twice the value; "much" is
// what stands out from the background: dark on light, bright on dark.
const RAMPS = {
  light: ["#f0f1eb", "#d3dec2", "#aacea5", "#71bf99", "#27ac9a", "#099399", "#077893", "#045e8e", "#174285", "#232b69", "#1f174a"],
  dark: ["#1f2026", "#2e2f49", "#3d3e6e", "#455094", "#4069b2", "#2c86c7", "#0ba5c9", "#35c0c3", "#6ad8ba", "#aeeaaa", "#f2f5a6"],
};
const LINES = {
  light: ["#3547c2", "#0c8f82", "#b8601b", "#93388a"],
  dark: ["#98a6ff", "#4fd0bd", "#f0a35e", "#dd8fd5"],
};
// Paper is white, whatever the screen: printing repaints in light colours.
const darkScreen = window.matchMedia("screen and (prefers-color-scheme: dark)");
const theme = () => (darkScreen.matches ? "dark" : "light");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const RGB = { light: RAMPS.light.map(channels), dark: RAMPS.dark.map(channels) };

// The colour of a share from 0 to 1, as three channels.
function colour(share) {
  const stops = RGB[theme()];
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const below = Math.min(Math.floor(place), stops.length - 2);
  return stops[below].map((low, k) => Math.round(low + (place - below) * (stops[below + 1][k] - low)));
}

const rgb = (values) => `rgb(${values.join(" ")})`;

// The ends of a statistic's colours: the range that it may have, cut where nothing comes near.
function range(statistic) {
  const [least, most] = extent(knownValues(statistic));
  if (!Number.isFinite(least)) return [0, 1];
  if (byId("stretch").checked) return most > least ? [least, most] : [least, least + 1];
  const low = statistic.low ?? least;
  const high = isKnown(statistic.high) && most > statistic.high / 2 ? statistic.high : most;
  return high > low ? [low, high] : [low, low + 1];
}

// ---------------------------------------------------------------------- what comes packed: Plotly, maps

async function inflate(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

let loading = null;

// Plotly, once something needs it. The policy of the page allows this text by its hash, no other.
function plotly() {
  loading ??= inflate(byId("plotly").textContent).then((source) => {
    document.head.append(element("script", { textContent: new TextDecoder().decode(source) }));
    return window.Plotly;
  });
  return loading;
}

function half(bits) {
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return null; // no number
  return exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const unpacked = new Map();

// Rows of one head from a packed array of all heads of a layer.
async function rowsOf(packed, head) {
  if (!packed) return null;
  if (!unpacked.has(packed)) unpacked.set(packed, inflate(packed.data));
  const view = new DataView(await unpacked.get(packed));
  const [heads, ...rest] = packed.shape;
  if (head >= heads) return null;
  const [rows, columns] = rest.length === 2 ? rest : [1, ...rest];
  const start = head * rows * columns;
  const one = (row, column) => half(view.getUint16(2 * (start + row * columns + column), true));
  return Array.from({ length: rows }, (_, row) => Array.from({ length: columns }, (_, c) => one(row, c)));
}

async function draw(target, traces, layout) {
  const Plotly = await plotly();
  const ink = css("--ink-faint");
  const base = {
    font: { family: css("--sans"), size: 11, color: ink },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    dragmode: false,
    hoverlabel: {
      bgcolor: css("--ink"),
      bordercolor: css("--ink"),
      font: { family: css("--sans"), size: 12, color: css("--background") },
      align: "left",
    },
  };
  return Plotly.react(target, traces, { ...base, ...layout }, { displayModeBar: false, responsive: true });
}

// -------------------------------------------------------------------------------- the selected head

// The address remembers the head: #name-of-the-layer/head. It is the only place that does.
const selection = { layer: null, head: null };

function fragment(layer, head) {
  return `#${encodeURIComponent(layers[layer].name)}/${head}`;
}

function fromAddress() {
  const text = location.hash.slice(1);
  const cut = text.lastIndexOf("/");
  if (cut < 0) return null;
  let name;
  try {
    name = decodeURIComponent(text.slice(0, cut));
  } catch {
    return null;
  }
  const head = Number(text.slice(cut + 1));
  const layer = layers.findIndex((one) => one.name === name);
  const exists = layer >= 0 && Number.isInteger(head) && head >= 0 && head < layers[layer].heads;
  return exists ? { layer, head } : null;
}

// Going to a head by mouse makes a step in the history; by arrow keys or lists it does not.
function go(layer, head, { step = true } = {}) {
  if (step) location.hash = fragment(layer, head);
  else location.replace(fragment(layer, head));
}

function select(layer, head, reveal) {
  selection.layer = layer;
  selection.head = head;
  markSelected();
  drawHead();
  // Where the panel is not beside the maps but below them, bring it into view.
  const panel = byId("head").getBoundingClientRect();
  if (reveal && (panel.top > 0.7 * innerHeight || panel.bottom < 120)) byId("head").scrollIntoView();
}

// ------------------------------------------------------------------- statistics and layers by heads

let current = statistics[0];
const cells = []; // cells[layer][head]

function drawThumbnails() {
  const wide = stacks.reduce((sum, stack) => sum + stack.heads, stacks.length - 1);
  const tall = Math.max(...stacks.map((stack) => stack.rows.length));
  for (const [index, statistic] of statistics.entries()) {
    const canvas = byId("statistics").children[index].firstChild;
    canvas.width = wide;
    canvas.height = tall;
    const context = canvas.getContext("2d");
    const image = context.createImageData(wide, tall);
    const [low, high] = range(statistic);
    let left = 0;
    for (const stack of stacks) {
      stack.rows.forEach(({ layer }, y) => {
        (layers[layer].values[statistic.name] ?? []).forEach((value, x) => {
          if (!isKnown(value)) return;
          image.data.set([...colour((value - low) / (high - low)), 255], 4 * (y * wide + left + x));
        });
      });
      left += stack.heads + 1;
    }
    context.putImageData(image, 0, 0);
  }
}

function buildThumbnails() {
  for (const statistic of statistics) {
    const button = element(
      "button",
      { type: "button", role: "radio", title: statistic.description },
      element("canvas", { "aria-hidden": "true" }),
      element("span", { textContent: statistic.label }),
    );
    button.addEventListener("click", () => choose(statistic));
    byId("statistics").append(button);
  }
  new ResizeObserver(([{ contentRect }]) => {
    const most = Math.max(1, Math.floor((contentRect.width + 8) / 148));
    const rows = Math.ceil(statistics.length / most);
    byId("statistics").style.setProperty("--per-row", Math.ceil(statistics.length / rows));
  }).observe(byId("statistics"));
  byId("statistics").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = (statistics.indexOf(current) + step + statistics.length) % statistics.length;
    choose(statistics[next]);
    byId("statistics").children[next].focus();
  });
}

function choose(statistic) {
  current = statistic;
  paint();
}

// Of so many neighbours one gets a label: a number that people count by.
const every = (least) => [1, 2, 5, 10, 20, 50, 100].find((step) => step >= least) ?? 200;

// The cells of every stack, once; `paint` gives them the colours of a statistic.
function buildStacks() {
  for (const stack of stacks) {
    const room = byId("stacks").clientWidth || 320;
    const longest = Math.max(...stack.rows.map((row) => row.label.length));
    const meanWidth = room < 480 ? 40 : 88;
    const across = (room - 12 - 7 * longest - meanWidth) / Math.max(stack.heads, 1);
    const width = Math.min(58, across);
    const height = Math.max(stack.rows.length > 40 ? 8 : 11, Math.min(28, 0.72 * width));
    const gap = width > 12 ? 2 : 1;
    const grid = element("div", { className: "grid", role: "grid", "aria-label": `${stack.prefix} ${stack.kind}` });
    grid.style.cssText =
      `--cell-height: ${height}px; --gap: ${gap}px; --corner: ${width > 16 ? 3 : 1}px; ` +
      `grid-template-columns: auto repeat(${Math.max(stack.heads, 1)}, minmax(0, ${width - gap}px)) ${meanWidth}px`;
    const everyHead = every(22 / width);
    const labels = element("div", { "aria-hidden": "true", role: "row" }, element("span"));
    for (let head = 0; head < stack.heads; head++) {
      const text = head % everyHead === 0 ? String(head) : "";
      labels.append(element("span", { className: "head-label", textContent: text }));
    }
    labels.append(element("span", { className: "mean-label", textContent: "mean" }));
    grid.append(labels);
    const everyRow = every(12 / (height + gap));
    stack.rows.forEach((row, y) => {
      const label = y % everyRow === 0 ? row.label : "";
      const line = element("div", { role: "row" }, element("span", { className: "layer-label", textContent: label }));
      cells[row.layer] = Array.from({ length: layers[row.layer].heads }, (_, head) => {
        const cell = element("div", { className: "cell", role: "gridcell", tabIndex: -1 });
        cell.dataset.layer = row.layer;
        cell.dataset.head = head;
        return cell;
      });
      line.append(...cells[row.layer]);
      for (let head = layers[row.layer].heads; head < stack.heads; head++) line.append(element("span"));
      line.append(element("span", { className: "mean", "aria-hidden": "true" }, element("i")));
      grid.append(line);
    });
    const caption = element(
      "figcaption",
      {},
      element("b", { textContent: stack.prefix || "modules" }),
      element("span", { textContent: `  ${stack.kind}` }),
    );
    const figure = element("figure", { className: "stack-figure" }, caption, grid);
    byId("stacks").append(figure);
    grid.addEventListener("keydown", (event) => moveInGrid(event, stack));
  }
  const tip = element("div", { id: "tip", hidden: true });
  document.body.append(tip);
  byId("stacks").addEventListener("click", ({ target }) => {
    if (target.dataset.head) go(+target.dataset.layer, +target.dataset.head);
  });
  byId("stacks").addEventListener("pointerover", ({ target }) => showTip(target));
  byId("stacks").addEventListener("pointerleave", () => (tip.hidden = true));
}

function showTip(cell) {
  const tip = byId("tip");
  tip.hidden = !cell.dataset.head;
  if (tip.hidden) return;
  const [layer, head] = [+cell.dataset.layer, +cell.dataset.head];
  const place = element("span", { textContent: `${home.get(layer).title}, head ${head}` });
  const unit = isShare(current) ? "" : ` ${current.unit}`;
  tip.replaceChildren(place, "  ", shown(current, valueOf(current, layer, head)) + unit);
  const box = cell.getBoundingClientRect();
  const left = box.left + box.width / 2 - tip.offsetWidth / 2;
  tip.style.left = `${Math.max(4, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${box.top - tip.offsetHeight - 7}px`;
}

// One cell of a grid can be reached by Tab, the arrow keys go on from there.
function moveInGrid(event, stack) {
  const { layer, head } = event.target.dataset;
  if (head === undefined) return;
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    go(+layer, +head, { step: false });
    return;
  }
  const move = {
    ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
    Home: [0, -Infinity], End: [0, Infinity],
  }[event.key];
  if (!move) return;
  event.preventDefault();
  const at = stack.rows.findIndex((row) => row.layer === +layer) + move[0];
  const row = stack.rows[Math.min(Math.max(at, 0), stack.rows.length - 1)].layer;
  const column = Math.min(Math.max(+head + move[1], 0), layers[row].heads - 1);
  const next = cells[row][column];
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  showTip(next);
}

function markSelected() {
  for (const cell of document.querySelectorAll('.cell[aria-selected="true"]')) cell.removeAttribute("aria-selected");
  for (const stack of stacks) {
    for (const { layer } of stack.rows) for (const cell of cells[layer]) cell.tabIndex = -1;
    const here = stack.rows.some((row) => row.layer === selection.layer);
    const entry = here ? cells[selection.layer][selection.head] : cells[stack.rows[0].layer][0];
    if (entry) entry.tabIndex = 0;
  }
  cells[selection.layer]?.[selection.head]?.setAttribute("aria-selected", "true");
}

function paint() {
  const [low, high] = range(current);
  byId("statistic-label").textContent = current.label;
  byId("statistic-description").textContent = current.description;
  byId("scale-low").textContent = shown(current, low);
  byId("scale-high").textContent = shown(current, high);
  byId("scale-unit").textContent = isShare(current) ? "" : current.unit;
  byId("ramp").style.background = `linear-gradient(to right, ${RAMPS[theme()].join(",")})`;
  [...byId("statistics").children].forEach((button, index) => {
    const chosen = statistics[index] === current;
    button.setAttribute("aria-checked", chosen);
    button.tabIndex = chosen ? 0 : -1;
  });
  for (const [layer, row] of cells.entries()) {
    row.forEach((cell, head) => {
      const value = valueOf(current, layer, head);
      cell.classList.toggle("unknown", !isKnown(value));
      cell.style.background = isKnown(value) ? rgb(colour((value - low) / (high - low))) : "none";
      cell.setAttribute("aria-label", `${home.get(layer).title}, head ${head}: ${shown(current, value)}`);
    });
    const values = (layers[layer].values[current.name] ?? []).filter(isKnown);
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    const bar = row[0]?.parentElement.lastChild.firstChild;
    if (bar) bar.style.width = values.length ? `${Math.min(100, (100 * (mean - low)) / (high - low))}%` : "0";
    if (bar) bar.parentElement.title = values.length ? `mean ${shown(current, mean)}` : "";
  }
  drawThumbnails();
}

// ------------------------------------------------------------------------ the panel of one head

function buildChoice() {
  for (const stack of stacks) {
    const group = element("optgroup", { label: `${stack.prefix || "modules"} (${stack.kind})` });
    for (const row of stack.rows) group.append(element("option", { value: row.layer, textContent: row.label }));
    byId("choose-layer").append(group);
  }
  byId("choose-layer").addEventListener("change", ({ target }) => {
    const layer = +target.value;
    go(layer, Math.min(selection.head, layers[layer].heads - 1), { step: false });
  });
  byId("choose-head").addEventListener("change", ({ target }) => go(selection.layer, +target.value, { step: false }));
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
}

// The next head, on to the next layer after the last one.
function turn(by) {
  const order = stacks.flatMap((stack) => stack.rows.map((row) => row.layer)).filter((layer) => layers[layer].heads);
  let { layer, head } = selection;
  head += by;
  if (head < 0 || head >= layers[layer].heads) {
    layer = order[(order.indexOf(layer) + by + order.length) % order.length];
    head = by > 0 ? 0 : layers[layer].heads - 1;
  }
  go(layer, head, { step: false });
}

function drawHead() {
  const { layer, head } = selection;
  const { stack, title } = home.get(layer);
  byId("choose-layer").value = layer;
  const options = layers[layer].values ? Array.from({ length: layers[layer].heads }, (_, k) => k) : [];
  byId("choose-head").replaceChildren(...options.map((k) => element("option", { value: k, textContent: k })));
  byId("choose-head").value = head;
  byId("head-stack").textContent = [stack.prefix, stack.kind].filter(Boolean).join("  ·  ");
  byId("head-title").textContent = `${title}, head ${head}`;
  byId("head-name").textContent = `${layers[layer].name}  ·  ${layers[layer].head_dim} dimensions`;
  byId("head-findings").replaceChildren(
    ...findings.flatMap((finding, index) => {
      if (!finding.heads.some(([l, h]) => l === layer && h === head)) return [];
      const link = element("a", { href: `#finding-${index}`, textContent: finding.title });
      return [element("li", { className: finding.severity }, link)];
    }),
  );
  byId("head-words").replaceChildren(...inWords(layer, head));
  drawKeys(layers[layer].keys[head] ?? []);
  drawStatistics(layer, head);
  drawSimilar(layer, head);
  drawMap(layer, head);
}

// What the numbers say, in two to four sentences.
function inWords(layer, head) {
  const value = (name) => layers[layer].values[name]?.[head];
  const bold = (text) => element("b", { textContent: text });
  const sentences = [];
  if (isKnown(value("effective_keys"))) {
    const share_ = value("max_probability");
    sentences.push([
      "A query looks at about ", bold(`${number(value("effective_keys"))} keys`),
      ...(isKnown(share_) ? [", and gives ", bold(share(share_)), " to the strongest"] : []), ". ",
    ]);
  }
  if (isKnown(value("normalized_entropy"))) {
    const level = value("normalized_entropy");
    const name = level > 0.9 ? "close to uniform" : level > 0.6 ? "broad" : level > 0.3 ? "selective" : "sharply focused";
    sentences.push(["Its attention is ", bold(name), ` (${number(level)} of the largest entropy). `]);
  }
  const strongest = (layers[layer].keys[head] ?? [])[0];
  if (isKnown(value("sink")) && strongest) {
    const token = element("span", { className: "token", textContent: strongest[0] });
    sentences.push([
      "The strongest key, ", token, ` at position ${strongest[1]}, receives `, bold(share(strongest[3])),
      severalTexts ? `, in text ${strongest[2]}` : "", ". ",
    ]);
  }
  if (isKnown(value("mean_distance"))) {
    const near = value("local_mass");
    sentences.push([
      "On average it reaches ", bold(`${number(value("mean_distance"))} tokens`), " away",
      ...(isKnown(near) ? [`; ${share(near)} stays close by`] : []), ".",
    ]);
  }
  return sentences.flat();
}

function drawKeys(keys) {
  const most = Math.max(...keys.map((key) => key[3] ?? 0), 0);
  const items = keys.map(([token, position, sequence, importance]) => {
    const fill = element("i");
    fill.style.width = `${most > 0 ? (100 * importance) / most : 0}%`;
    return element(
      "li",
      {},
      element("span", { className: "token", textContent: token, title: token }),
      element("span", { className: "where", textContent: `position ${position}${severalTexts ? `, text ${sequence}` : ""}` }),
      element("div", { className: "meter" }, fill),
      element("span", { className: "value", textContent: share(importance) }),
    );
  });
  byId("head-keys").replaceChildren(...(items.length ? items : [element("li", { textContent: "None were recorded." })]));
}

// A histogram of all heads with a line where this one is.
function strip(statistic, value) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 110 20");
  svg.setAttribute("aria-hidden", "true");
  const values = knownValues(statistic);
  const [least, most] = extent(values);
  const bins = new Array(28).fill(0);
  const at = (one) => (most > least ? (one - least) / (most - least) : 0.5);
  for (const one of values) bins[Math.min(27, Math.floor(28 * at(one)))] += 1;
  const tallest = Math.max(...bins);
  const bar = (n, k) => (n ? `M${(k * 110) / 28} 20v-${Math.max(1.5, (18 * n) / tallest)}h3.2V20z` : "");
  const path = document.createElementNS(svg.namespaceURI, "path");
  path.setAttribute("d", bins.map(bar).join(""));
  svg.append(path);
  if (isKnown(value)) {
    const line = document.createElementNS(svg.namespaceURI, "line");
    const x = Math.min(109, Math.max(1, 110 * at(value)));
    for (const [name, to] of Object.entries({ x1: x, x2: x, y1: -1, y2: 20 })) line.setAttribute(name, to);
    svg.append(line);
  }
  return svg;
}

function drawStatistics(layer, head) {
  const rows = statistics.map((statistic) => {
    const value = valueOf(statistic, layer, head);
    const unit = isShare(statistic) || !isKnown(value) ? "" : ` ${statistic.unit}`;
    return element(
      "tr",
      { title: statistic.description },
      element("th", { scope: "row", textContent: statistic.label }),
      element("td", {}, strip(statistic, value)),
      element("td", {}, shown(statistic, value), element("span", { textContent: unit })),
    );
  });
  byId("head-statistics").tBodies[0].replaceChildren(...rows);
}

const stillSelected = (layer, head) => selection.layer === layer && selection.head === head;

async function drawSimilar(layer, head) {
  const rows = await rowsOf(layers[layer].similarity, head);
  if (!stillSelected(layer, head)) return;
  const target = byId("head-similar");
  if (!rows || rows[0].length < 2) return target.replaceChildren();
  const likeness = rows[0];
  const others = likeness.map((value, other) => [value, other]).filter(([value, other]) => other !== head && isKnown(value));
  const [most, best] = others.reduce((a, b) => (b[0] > a[0] ? b : a), [-1, null]);
  const buttons = likeness.map((value, other) => {
    if (other === head) return element("span", { textContent: other, title: "this head" });
    const text = `head ${other}: CKA ${number(value)}`;
    const button = element("button", { type: "button", textContent: other, title: text, "aria-label": text });
    button.addEventListener("click", () => go(layer, other));
    if (!isKnown(value)) return button;
    const fill = colour(value);
    button.style.background = rgb(fill);
    button.style.color = fill[0] * 0.3 + fill[1] * 0.59 + fill[2] * 0.11 > 140 ? "#1a1b1f" : "#ffffff";
    return button;
  });
  target.replaceChildren(
    element("h4", {}, "Similar heads ", element("span", { textContent: "of the layer, by their outputs" })),
    element("div", { className: "similar" }, ...buttons),
    element("p", { className: "aside", textContent: best === null ? "" : `Most like head ${best}, linear CKA ${number(most)}.` }),
  );
}

// The last of 1, 2, 5, 10, 20 ... that is not larger.
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * ([5, 2].find((step) => step * power <= value * (1 + 1e-9)) ?? 1);
}

let logarithmic = null; // as the reader chose it; until then as the map needs it

async function drawMap(layer, head) {
  const map = await rowsOf(layers[layer].maps, head);
  if (!stillSelected(layer, head)) return;
  const target = byId("head-map");
  if (!map) return target.replaceChildren(element("p", { className: "aside", textContent: "No map was recorded." }));
  const positive = map.flat().filter((value) => value > 0).sort((a, b) => a - b);
  const most = positive.at(-1) ?? 1;
  // Peaked: with linear colours nine of ten cells would look empty.
  const peaked = positive.length > 0 && positive[Math.floor(0.9 * positive.length)] < 0.15 * most;
  const log = logarithmic ?? peaked;
  if (!target.querySelector(".plot")) buildMap(target);
  target.querySelectorAll(".switch button").forEach((button, index) => button.setAttribute("aria-pressed", log === (index === 1)));
  // The scale has at least a factor of 3 on both sides of the mean: an even map is to look even.
  const mean = positive.reduce((a, b) => a + b, 0) / Math.max(positive.length, 1) || 1;
  const top = Math.max(most, 3 * mean);
  const floor = Math.min(Math.max(positive[0] ?? 1e-6, most * 1e-4), mean / 3);
  const [rows, columns] = [map.length, map[0].length];
  const part = (index, all) => `${Math.round((100 * index) / all)}–${Math.round((100 * (index + 1)) / all)} %`;
  const axis = (all, title) => ({
    title: { text: title, font: { size: 11 }, standoff: 6 },
    tickvals: [0, 0.25, 0.5, 0.75, 1].map((at) => at * all - 0.5),
    ticktext: ["0 %", "25", "50", "75", "100 %"],
    range: [-0.5, all - 0.5],
    showgrid: false, zeroline: false, ticks: "outside", ticklen: 3, tickcolor: css("--line-strong"), fixedrange: true,
    ticklabeloverflow: "allow",
  });
  const powers = [];
  for (let power = Math.ceil(Math.log10(floor)); power <= Math.log10(top); power++) powers.push(power);
  const apart = nice(top / 3);
  const steps = Array.from({ length: Math.floor(top / apart + 1e-9) + 1 }, (_, k) => k * apart);
  const trace = {
    type: "heatmap",
    z: map.map((row) => row.map((value) => (value <= 0 ? null : log ? Math.log10(Math.max(value, floor)) : value))),
    zmin: log ? Math.log10(floor) : 0,
    zmax: log ? Math.log10(top) : top,
    text: map.map((row, y) => row.map((value, x) => `queries ${part(y, rows)}, keys ${part(x, columns)}<br>${share(value)}`)),
    hovertemplate: "%{text}<extra></extra>",
    colorscale: RAMPS[theme()].map((stop, k, all) => [k / (all.length - 1), stop]),
    xgap: 0, ygap: 0,
    colorbar: {
      thickness: 8, outlinewidth: 0, ticklen: 3, tickcolor: css("--line-strong"), len: 1, y: 0.5, xpad: 8, ypad: 0, ticklabeloverflow: "allow",
      ...(log && powers.length > 1 ? { tickvals: powers, ticktext: powers.map((p) => share(10 ** p)) } : log
        ? { tickvals: [Math.log10(floor), Math.log10(top)], ticktext: [share(floor), share(top)] }
        : { tickvals: steps, ticktext: steps.map(share) }),
    },
  };
  await draw(target.querySelector(".plot"), [trace], {
    margin: { l: 48, r: 4, t: 8, b: 40 },
    plot_bgcolor: RAMPS[theme()][0],
    xaxis: axis(columns, "key"),
    yaxis: { ...axis(rows, "query"), range: [rows - 0.5, -0.5] },
  });
}

function buildMap(target) {
  const switches = ["linear", "log"].map((name) => {
    const button = element("button", { type: "button", textContent: name });
    button.addEventListener("click", () => {
      logarithmic = name === "log";
      drawMap(selection.layer, selection.head);
    });
    return button;
  });
  target.replaceChildren(
    element(
      "div",
      { className: "map-bar" },
      element("h4", {}, "Attention map ", element("span", { textContent: "pooled; a row sums to 100\u00a0%" })),
      element("div", { className: "switch", role: "group", "aria-label": "Colour scale" }, ...switches),
    ),
    element("div", { className: "plot" }),
  );
}

// ------------------------------------------------------------------------------------------ depth

function drawDepth() {
  const lines = LINES[theme()];
  const line = (stack, k, key, dash = "solid") => ({
    type: "scatter",
    mode: stack.rows.length > 24 ? "lines" : "lines+markers",
    x: stack.rows.map((_, index) => index),
    y: stack.rows.map((row) => row[key]),
    line: { color: lines[k % lines.length], width: 2, dash },
    marker: { size: 5 },
    hovertemplate: "%{text}<extra></extra>",
    text: stack.rows.map((row) => {
      const where = key === "max_abs" ? `<br>token ${quoted(row.max_token)} at ${row.max_position}, channel ${row.max_channel}` : "";
      return `${quoted(row.name)}<br>${number(row[key])}${where}`;
    }),
  });
  // One key for the three charts, where there is something to tell apart.
  const key = blocks.map((stack, k) => {
    const swatch = element("i", { "aria-hidden": "true" });
    swatch.style.background = lines[k % lines.length];
    return element("li", {}, swatch, stack.prefix || "blocks");
  });
  byId("blocks").replaceChildren(...(blocks.length > 1 ? key : []));
  const longest = blocks.reduce((a, b) => (b.rows.length > a.rows.length ? b : a));
  const step = every(longest.rows.length / 10);
  const ticks = longest.rows.map((row, index) => [index, row.label]).filter(([index]) => index % step === 0);
  const axis = { zeroline: false, gridcolor: css("--line"), fixedrange: true, automargin: true };
  const layout = (yaxis) => ({
    margin: { l: 40, r: 8, t: 8, b: 36 },
    showlegend: false,
    hovermode: "closest",
    xaxis: {
      ...axis, showgrid: false, tickvals: ticks.map(([at]) => at), ticktext: ticks.map(([, label]) => quoted(label)),
      title: { text: "block", font: { size: 11 }, standoff: 4 },
    },
    yaxis: { ...axis, zeroline: true, zerolinecolor: css("--line-strong"), zerolinewidth: 1, ...yaxis },
  });
  const all = (name, dash) => blocks.map((stack, k) => line(stack, k, name, dash));
  const values = (name) => blocks.flatMap((stack) => stack.rows.map((row) => row[name])).filter(isKnown);
  const [least] = extent(values("token_similarity"));
  draw(byId("chart-similarity"), all("token_similarity"), layout({ range: [Math.min(0, 1.1 * least), 1.03] }));
  draw(byId("chart-rank"), all("effective_rank"), layout({ rangemode: "tozero" }));
  const [smallest, largest] = extent([...values("max_abs"), ...values("median_abs")].filter((value) => value > 0)).map(Math.log10);
  const powers = [];
  const apart = Math.max(1, Math.ceil((largest - smallest) / 6));
  for (let power = Math.floor(smallest); power <= largest; power += apart) powers.push(power);
  draw(byId("chart-activations"), [...all("max_abs"), ...all("median_abs", "dot")], layout({
    type: "log", tickvals: powers.map((power) => 10 ** power), ticktext: powers.map((power) => number(10 ** power)),
  }));
}

// ------------------------------------------------------------------------------------------ start

function keepHeights() {
  const watch = new ResizeObserver((entries) => {
    for (const { target } of entries) target.style.setProperty("--height", `${target.offsetHeight}px`);
  });
  watch.observe(byId("atlas"));
  watch.observe(byId("head"));
}

// What to show before the reader chooses: a head of the gravest finding that names one.
function firstHead() {
  const named = findings.flatMap((finding) => finding.heads)[0];
  const [layer, head] = named ?? [layers.findIndex((one) => one.heads > 0), 0];
  return { layer, head };
}

function start() {
  if (layers.some((layer) => layer.heads > 0) && statistics.length) {
    byId("stretch").addEventListener("change", paint);
    buildThumbnails();
    buildStacks();
    buildChoice();
    paint();
    const fromLink = fromAddress();
    const { layer, head } = fromLink ?? firstHead();
    select(layer, head, Boolean(fromLink));
    keepHeights();
    window.addEventListener("hashchange", () => {
      const asked = fromAddress();
      if (asked) select(asked.layer, asked.head, true);
    });
  }
  if (blocks.length) drawDepth();
  darkScreen.addEventListener("change", () => {
    if (cells.length) {
      paint();
      drawHead();
    }
    if (blocks.length) drawDepth();
  });
}

start();
