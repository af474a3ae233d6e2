// The page: asks the server, keeps the last minute, and draws.

const PERIOD = 2000; // milliseconds between two questions
const PATIENCE = 15_000; // milliseconds to wait for an answer: a server that is ending may never give it
const MINUTE = 60; // seconds that "last minute" looks back
const TOLD = 20_000; // milliseconds that a notice of the past stays
const KEY = "sglang-mixed-api-key";
const byId = (id) => document.getElementById(id);

const page = { report: null, memory: null, history: [], timer: 0, busy: false, away: 0, told: 0 };
const map = new HeatMap(byId("heat"), byId("heat-layers"), byId("heat-scroll"), (row, expert) => {
  byId("details").ariaLive = "polite";
  drawDetails(row, expert);
});
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

class Refused extends Error {}

/** Ask this server; the page's own address says where it is, behind any proxy. */
async function ask(path) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { cache: "no-store", headers, signal: AbortSignal.timeout(PATIENCE) });
  if (answer.status === 401 || answer.status === 403) throw new Refused();
  if (!answer.ok) throw new Error(`HTTP ${answer.status}, ${(await answer.text()).slice(0, 300)}`);
  return answer;
}

async function refresh() {
  if (page.busy || document.hidden || byId("key").open) return;
  page.busy = true;
  const asked = Date.now();
  try {
    const report = await (await ask("experts")).json();
    const restarted = page.report !== null && page.report.since !== report.since;
    // What weights take never changes while a server runs, and is work for it to tell.
    if (!page.memory || page.away || restarted) {
      page.memory = await (await ask("../mixed_precision?modules=false")).json();
    }
    receive(report, restarted);
  } catch (error) {
    fail(error);
  } finally {
    page.busy = false;
    clearTimeout(page.timer);
    page.timer = setTimeout(refresh, Math.max(PERIOD, 10 * (Date.now() - asked)));
  }
}

function receive(report, restarted) {
  if (restarted) page.history = [];
  if (page.away || Date.now() > page.told + TOLD) notice("");
  if (restarted) notice(`Counting began again at ${clock(report.since)}: the server was restarted or its counts were reset.`);
  page.away = 0;
  page.report = report;
  delete document.body.dataset.stale;
  setStatus("live", "live");
  if (report.state === "counting") {
    page.history = page.history.filter((one) => one.until >= report.until - MINUTE);
    page.history.push(report);
  } else {
    notice(report.reason);
  }
  draw();
}

function fail(error) {
  if (error instanceof Refused) {
    setStatus("away", "needs a key");
    byId("key").showModal();
    return;
  }
  page.away ||= Date.now();
  document.body.dataset.stale = "";
  setStatus("away", "no answer");
  const what = error instanceof TypeError || error.name === "TimeoutError" ? "The server does not answer" : `The server has no report: ${error.message}`;
  notice(`${what} (since ${new Date(page.away).toLocaleTimeString("en-GB")}). What you see is its last answer; the page keeps asking.`);
}

function setStatus(state, text) {
  const status = byId("status");
  if (status.textContent !== text) status.textContent = text;
  status.dataset.state = state;
}

function notice(text) {
  page.told = Date.now();
  byId("notice").hidden = !text;
  if (byId("notice").textContent !== text) byId("notice").textContent = text;
}

/** Tokens [layers][experts] of the chosen phase and time. */
function matrix() {
  const { report, history } = page;
  const phase = chosen("phase");
  const of = (one) => (phase === "total" ? add(one.prefill, one.decode) : one[phase]);
  return chosen("window") === "minute" ? subtract(of(report), of(history[0])) : of(report);
}

function draw() {
  if (!page.memory) return;
  drawMemory();
  if (page.report.map) drawMapPanel(page.report.map);
  const counting = page.report.state === "counting";
  for (const id of ["heat-title", "balance-title", "top-title"]) byId(id).closest("section").hidden = !counting;
  for (const button of document.querySelectorAll("[data-download]")) button.disabled = !counting;
  const ranks = everyRank(page.memory).length;
  byId("subtitle").textContent = `${baseName(page.memory)}${ranks > 1 ? ` on ${ranks} ranks` : ""}`;
  if (counting) drawCounts();
  else drawTiles(byId("tiles"), [memoryTile()]);
}

const baseName = (memory) => memory.sources[memory.base].split("/").filter(Boolean).slice(-1)[0] ?? memory.base;

function drawCounts() {
  const { report } = page;
  const tokens = matrix();
  const minute = chosen("window") === "minute";
  map.show(tokens, report.layers, report.formats?.cells ?? null);
  drawLegends();
  // Whoever listens hears of a cell once, not at every answer.
  byId("details").ariaLive = "off";
  if (map.selected) drawDetails(...map.selected);
  drawBalance(byId("balance"), report.layers, tokens);
  drawBalanceText(tokens);
  drawTop(tokens);
  drawCountTiles();
  const since = minute ? page.history[0].until : report.since;
  byId("period").textContent = `${clock(since)} to ${clock(report.until)}`;
}

function drawCountTiles() {
  const { report, history } = page;
  const passed = (matrix) => sum(matrix[0]) / report.top_k;
  const [prefill, decode] = [passed(report.prefill), passed(report.decode)];
  const before = history[Math.max(0, history.length - 4)];
  const seconds = report.until - before.until;
  const rate = seconds > 0 ? (prefill + decode - passed(before.prefill) - passed(before.decode)) / seconds : 0;
  drawTiles(byId("tiles"), [
    ["tokens", few(prefill + decode), `prefill ${few(prefill)} · decode ${few(decode)}`],
    ["now", `${few(Math.round(rate))} /s`, "tokens, the last seconds"],
    ["experts", `${report.layers.length} × ${report.experts}`, `top-${report.top_k} in each layer`],
    memoryTile(),
  ]);
}

function memoryTile() {
  const ranks = everyRank(page.memory);
  const [held, widened] = ["weight_bytes", "bf16_bytes"].map((key) => sum(ranks.map((rank) => rank[key])));
  return ["weights", bytes(held), `${(widened / held).toFixed(2)} × smaller than 16 bits`];
}

function drawLegends() {
  const labels = page.report.formats?.labels ?? [];
  byId("ramp").style.background = gradient(-1);
  byId("ramp-text").textContent = `${map.largestMultiple.toFixed(1)} × an even share`;
  const shown = [...labels, map.format, isDark()].join("\n");
  if (byId("formats").dataset.shown === shown) return;
  byId("formats").dataset.shown = shown;
  byId("formats").replaceChildren(...labels.map(formatButton));
}

function formatButton(text, number) {
  const color = make("i", { style: `background: ${gradient(number)}` });
  const pressed = String(map.format === number);
  const button = make("button", { type: "button", class: "format", "aria-pressed": pressed }, color, make("b", {}, formatLetter(number)), text);
  button.addEventListener("click", () => {
    map.format = map.format === number ? null : number;
    map.draw();
    drawLegends();
    byId("formats").children[number].focus();
  });
  return button;
}

const formatOf = (row, expert) => page.report.formats?.labels[page.report.formats.cells[row][expert]] ?? "unknown format";

function drawDetails(row, expert) {
  const { report } = page;
  if (!(row in report.layers) || expert >= report.experts) return;
  const [prefill, decode] = [report.prefill[row][expert], report.decode[row][expert]];
  const total = prefill + decode;
  const even = sum(add(report.prefill, report.decode)[row]) / report.experts;
  const last = report.last_active[row][expert];
  const facts = [
    formatOf(row, expert),
    `${integer.format(total)} tokens (prefill ${integer.format(prefill)}, decode ${integer.format(decode)})`,
    even ? `${(total / even).toFixed(2)} × an even share` : "",
    total ? `mean router weight ${(report.weights[row][expert] / total).toFixed(3)}` : "",
    last ? `last active ${ago(report.until - last)}` : "never active",
  ];
  const text = facts.filter(Boolean).join(" · ");
  byId("details").replaceChildren(make("strong", {}, `Layer ${report.layers[row]}, expert ${expert}`), text);
}

function drawBalanceText(tokens) {
  const mean = (values) => sum(values) / values.length;
  const values = [gini, topShare].map((measure) => tokens.map(measure).filter((value) => value !== null));
  const even = Math.ceil(page.report.experts / 10) / page.report.experts;
  byId("balance-text").replaceChildren(
    ...(values[0].length
      ? [
          make("span", { style: "color: var(--bar)" }, "● Gini"), ` ${mean(values[0]).toFixed(2)} in the mean (0 is even) · `,
          make("span", { style: "color: var(--second)" }, "■ hottest 10 %"), ` ${percent(mean(values[1]))} of the tokens (even: ${percent(even)}). By layer:`,
        ]
      : ["no tokens yet"]),
  );
}

function drawTop(tokens) {
  const rows = largest(tokens, 10).map(([row, expert, count]) => [
    page.report.layers[row], expert, formatOf(row, expert), integer.format(count), percent(count / sum(tokens[row])),
  ]);
  drawTable(byId("top"), ["layer", "expert", "format", "tokens", "share"], rows, new Set([0, 1, 3, 4]));
}

function drawMemory() {
  const ranks = everyRank(page.memory);
  const [held, widened] = ["weight_bytes", "bf16_bytes"].map((key) => sum(ranks.map((rank) => rank[key])));
  const where = ranks.length > 1 ? `, all ${ranks.length} ranks together` : "";
  byId("memory-text").textContent = `${bytes(held)} instead of ${bytes(widened)} in 16 bits${where}`;
  drawBars(byId("by-format"), sumMemory(ranks, "by_format"));
  drawBars(byId("by-kind"), sumMemory(ranks, "by_module_kind"));
}

function drawMapPanel(described) {
  const shown = JSON.stringify(described);
  if (byId("map").dataset.shown === shown) return;
  byId("map").dataset.shown = shown;
  byId("map-text").textContent = described.path;
  drawMap(byId("map"), described);
}

async function download(kind) {
  try {
    if (kind === "json") save(kind, await (await ask("experts.json")).blob());
    if (kind === "csv") save(kind, new Blob([toCsv(page.report)], { type: "text/csv" }));
    if (kind === "png") {
      const title = `${baseName(page.memory)}: tokens per expert, ${chosen("phase")}, ${byId("period").textContent}`;
      save(kind, await toPng(map, title, page.report.formats?.labels ?? []));
    }
  } catch (error) {
    fail(error);
  }
}

const stored = localStorage.getItem("sglang-mixed-theme");
if (stored) document.documentElement.dataset.theme = stored;
byId("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("sglang-mixed-theme", theme);
  draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("resize", draw);
document.addEventListener("visibilitychange", () => (document.hidden ? setStatus("paused", "paused") : refresh()));
for (const input of document.querySelectorAll(".choice input")) input.addEventListener("change", draw);
for (const button of document.querySelectorAll("[data-download]")) button.addEventListener("click", () => download(button.dataset.download));
byId("key").addEventListener("close", () => {
  sessionStorage.setItem(KEY, byId("key-value").value);
  refresh();
});
refresh();
