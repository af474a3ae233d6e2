// Small charts and tables, made of elements. Text from the server only ever becomes text nodes.

/** An element with attributes and children. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Two lines over the layers: Gini coefficient and share of the hottest tenth. */
function drawBalance(container, layers, matrix) {
  const [width, height, left, bottom] = [Math.max(280, container.clientWidth || 480), 190, 34, 26];
  const x = (row) => left + ((width - left - 12) * (row + 0.5)) / layers.length;
  const y = (value) => 8 + (height - bottom - 8) * (1 - value);
  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": "balance-text" });
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(makeSvg("line", { class: "grid", x1: left, x2: width - 12, y1: y(tick), y2: y(tick) }));
    svg.append(makeSvg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
  }
  const every = Math.ceil((layers.length * 24) / (width - left));
  layers.forEach((layer, row) => {
    if (row % every) return;
    svg.append(makeSvg("text", { x: x(row), y: height - 6, "text-anchor": "middle" }, String(layer)));
  });
  series(svg, "gini", matrix.map(gini), layers, x, y);
  series(svg, "top", matrix.map(topShare), layers, x, y);
  container.replaceChildren(svg);
}

function series(svg, name, values, layers, x, y) {
  const known = values.map((value, row) => [value, row]).filter(([value]) => value !== null);
  svg.append(makeSvg("polyline", { class: name, points: known.map(([value, row]) => `${x(row)},${y(value)}`).join(" ") }));
  const radius = layers.length > 40 ? 2 : 3.5;
  for (const [value, row] of known) {
    const title = makeSvg("title", {}, `layer ${layers[row]}: ${name === "gini" ? "Gini" : "top 10 %"} ${value.toFixed(3)}`);
    const shape = { class: name, "data-value": value };
    svg.append(
      name === "gini"
        ? makeSvg("circle", { ...shape, cx: x(row), cy: y(value), r: radius }, title)
        : makeSvg("rect", { ...shape, x: x(row) - radius, y: y(value) - radius, width: 2 * radius, height: 2 * radius }, title),
    );
  }
}

/** Rows of label, bar (what 16 bits would take behind it) and numbers, the largest first. */
function drawBars(container, totals) {
  const rows = Object.entries(totals).sort((a, b) => b[1].bf16_bytes - a[1].bf16_bytes);
  const limit = Math.max(1, ...rows.map(([, one]) => Math.max(one.bytes, one.bf16_bytes)));
  container.replaceChildren(
    ...rows.map(([name, one]) =>
      make(
        "div",
        { class: "bar", title: `${bytes(one.bytes)} in memory, ${bytes(one.bf16_bytes)} in 16 bits` },
        make("span", { class: "label" }, name),
        make(
          "span",
          { class: "track" },
          make("i", { style: `width: ${(100 * one.bf16_bytes) / limit}%` }),
          make("i", { style: `width: ${(100 * one.bytes) / limit}%` }),
        ),
        make("span", { class: "value" }, `${bytes(one.bytes)} of ${bytes(one.bf16_bytes)}`),
      ),
    ),
  );
}

/** A table; the columns named in `numbers` stand to the right. */
function drawTable(table, heads, rows, numbers) {
  const cell = (tag, text) => (_, column) =>
    make(tag, numbers.has(column) ? { class: "number" } : {}, String(text(column)));
  table.replaceChildren(
    make("thead", {}, make("tr", {}, ...heads.map(cell("th", (column) => heads[column])))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map(cell("td", (column) => row[column]))))),
  );
}

function drawTiles(list, tiles) {
  list.replaceChildren(
    ...tiles.map(([name, value, small]) => make("div", {}, make("dt", {}, name), make("dd", {}, value, make("small", {}, small)))),
  );
}

/** The map as YAML, from the values that the server's plan holds. */
function drawMap(pre, described) {
  const key = (text) => (/^[\w.-]+$/.test(text) ? text : JSON.stringify(text));
  const lines = ["mixed_precision:"];
  for (const [name, path] of Object.entries(described.sources)) lines.push(`  ${key(`${name}_path`)}: ${path}`);
  if (described.default) lines.push(`  default: ${key(described.default)}`);
  if (described.rules.length) lines.push("  weight_mapping:");
  const rules = described.rules.map((rule) => [`    ${JSON.stringify(rule.pattern)}: ${key(rule.source)}`, rule.line]);
  const width = Math.max(0, ...rules.map(([text]) => text.length));
  const comment = (line) => make("span", { class: "comment" }, `  # line ${line}\n`);
  pre.replaceChildren(lines.join("\n"), "\n", ...rules.flatMap(([text, line]) => [text.padEnd(width), comment(line)]));
}
