// Files for the person at the page: the server's export, a table, a picture.

function save(name, blob) {
  const stamp = new Date().toISOString().slice(0, 19).replace(/[:T]/g, "-");
  const link = make("a", { href: URL.createObjectURL(blob), download: `experts-${stamp}.${name}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** One line per expert of a report, with the columns of `sglang-mixed experts --csv`. */
function toCsv(report) {
  const quote = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = ["layer_id,expert_id,format,activation_count,total_tokens_processed,prefill,decode,weight_sum,last_activation_time"];
  report.layers.forEach((layer, row) => {
    for (let expert = 0; expert < report.experts; expert += 1) {
      const [prefill, decode] = [report.prefill[row][expert], report.decode[row][expert]];
      const format = report.formats?.labels[report.formats.cells[row][expert]] ?? "";
      const total = prefill + decode;
      const rest = [prefill, decode, report.weights[row][expert], report.last_active[row][expert]];
      lines.push([layer, expert, quote(format), total, total, ...rest].join(","));
    }
  });
  return `${lines.join("\n")}\n`;
}

/** The heat map with its layers, title and formats, as a PNG blob. */
function toPng(map, title, labels) {
  const metrics = { cell: map.metrics.cell, height: map.metrics.height };
  const [width, height] = [Math.max(520, GUTTER + 12 + metrics.cell * map.matrix[0].length), HEAD + metrics.height * map.matrix.length];
  const canvas = document.createElement("canvas");
  const context = fit(canvas, width, height + 40 + 22 * Math.max(1, labels.length));
  context.fillStyle = cssColor("--panel");
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = cssColor("--text");
  context.font = "600 14px system-ui, sans-serif";
  context.fillText(title, GUTTER, 20);
  context.translate(0, 30);
  context.drawImage(map.layersCanvas, 0, 0, GUTTER, height);
  context.translate(GUTTER, 0);
  map.paint(context, metrics);
  labels.forEach((text, number) => {
    const y = height + 18 + 22 * number;
    ramp(number).forEach((color, step) => {
      context.fillStyle = color;
      context.fillRect(step, y - 9, 1, 9);
    });
    label(context, "left");
    context.fillText(`${formatLetter(number)}  ${text}`, 74, y);
  });
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
