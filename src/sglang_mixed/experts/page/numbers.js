// What is computed from a report, and how numbers are written.

const integer = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const few = (number) => (number < 10_000 ? integer.format(number) : compact.format(number));

function bytes(number) {
  let unit = 0;
  while (number >= 1024 && unit < 4) {
    number /= 1024;
    unit += 1;
  }
  return `${unit ? number.toFixed(2) : number} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

const clock = (seconds) => new Date(1000 * seconds).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });

function ago(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 129_600 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86_400)} days ago`;
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

/** Rows of two matrices, combined value by value. */
const combine = (one, other, operation) =>
  one.map((row, layer) => row.map((value, expert) => operation(value, other[layer][expert])));

const add = (one, other) => combine(one, other, (a, b) => a + b);
const subtract = (one, other) => combine(one, other, (a, b) => a - b);

/** Gini coefficient of one layer; null without tokens. The formula is that of balance.py. */
function gini(row) {
  const total = sum(row);
  const ascending = [...row].sort((a, b) => a - b);
  const n = row.length;
  return total ? sum(ascending.map((value, i) => (2 * (i + 1) - n - 1) * value)) / (n * total) : null;
}

/** Share of the hottest tenth of the experts, rounded up to whole ones; null without tokens. */
function topShare(row) {
  const total = sum(row);
  const descending = [...row].sort((a, b) => b - a);
  return total ? sum(descending.slice(0, Math.ceil(row.length / 10))) / total : null;
}

/** The `count` largest cells as [layer row, expert, tokens], idle ones left out. */
function largest(matrix, count) {
  return matrix
    .flatMap((row, layer) => row.map((tokens, expert) => [layer, expert, tokens]))
    .filter((cell) => cell[2] > 0)
    .sort((a, b) => b[2] - a[2])
    .slice(0, count);
}

/** Reports of all ranks of a server: tensor-parallel ones within data-parallel ones. */
function everyRank(report) {
  return [report, ...(report.data_parallel_ranks ?? [])].flatMap((group) => group.tensor_parallel_ranks ?? [group]);
}

/** {label: {bytes, bf16_bytes}} of all ranks together. */
function sumMemory(ranks, key) {
  const totals = {};
  for (const rank of ranks) {
    for (const [label, one] of Object.entries(rank[key])) {
      const total = (totals[label] ??= { bytes: 0, bf16_bytes: 0 });
      total.bytes += one.bytes;
      total.bf16_bytes += one.bf16_bytes;
    }
  }
  return totals;
}
