// The heat map: layers x experts on a canvas that scrolls sideways, layer numbers on one that does not.

const HEAD = 18; // pixels above the cells, for the experts' numbers
const GUTTER = 44; // pixels beside the cells, for the layers' numbers

class HeatMap {
  constructor(canvas, layersCanvas, scroll, onSelect) {
    Object.assign(this, { canvas, layersCanvas, scroll, onSelect, selected: null, format: null });
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerdown", (event) => this.#point(event));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.draw()).observe(scroll);
  }

  /** `matrix` [layers][experts] of tokens, `layers` their numbers, `cells` the numbers of their formats or null. */
  show(matrix, layers, cells) {
    Object.assign(this, { matrix, layers, cells });
    this.draw();
  }

  /** Every layer has as many tokens: what a cell's color tells is its multiple of an even share. */
  get largestMultiple() {
    return Math.max(1, ...this.matrix.map((row) => (Math.max(...row) * row.length) / (sum(row) || 1)));
  }

  size(width) {
    const experts = this.matrix[0].length;
    const cell = Math.min(150, Math.max(6, Math.floor(width / experts)));
    return { cell, height: Math.min(44, Math.max(9, Math.floor(520 / this.matrix.length))), experts };
  }

  draw() {
    if (!this.matrix) return;
    this.metrics = this.size(this.scroll.clientWidth);
    const { cell, height, experts } = this.metrics;
    const context = fit(this.canvas, cell * experts, HEAD + height * this.matrix.length);
    this.#numbers(context);
    this.paint(context, this.metrics);
    this.#layerNumbers(fit(this.layersCanvas, GUTTER, HEAD + height * this.matrix.length));
    if (this.selected) this.#outline(context);
  }

  /** Paint the cells with the top left one at (0, HEAD). */
  paint(context, { cell, height }) {
    const limit = this.largestMultiple;
    const gap = cell >= 8 && height >= 8 ? 1 : 0;
    this.matrix.forEach((row, layer) => {
      const even = sum(row) / row.length || 1;
      row.forEach((tokens, expert) => {
        const format = this.cells ? this.cells[layer][expert] : -1;
        const step = stepOf(tokens / even, limit);
        const [x, y] = [expert * cell, HEAD + layer * height];
        context.globalAlpha = this.format === null || this.format === format ? 1 : 0.1;
        context.fillStyle = ramp(format)[step];
        context.fillRect(x, y, cell - gap, height - gap);
        if (format >= 0 && cell >= 20 && height >= 20) this.#letter(context, format, x, y, step);
      });
    });
    context.globalAlpha = 1;
  }

  #letter(context, format, x, y, step) {
    context.fillStyle = step > 31 !== isDark() ? "#ffffff" : "#111111";
    context.font = "600 11px system-ui, sans-serif";
    context.textAlign = "left";
    context.fillText(formatLetter(format), x + 5, y + 14);
  }

  #numbers(context) {
    const { cell, experts } = this.metrics;
    const every = [1, 2, 4, 8, 16, 32, 64].find((count) => count * cell >= 26) ?? 64;
    label(context, "center");
    for (let expert = 0; expert < experts; expert += every) context.fillText(expert, (expert + 0.5) * cell, 12);
  }

  #layerNumbers(context) {
    const { height } = this.metrics;
    const every = Math.ceil(14 / height);
    label(context, "right");
    context.fillText("layer", GUTTER - 8, 12);
    this.layers.forEach((number, row) => {
      if (row % every === 0) context.fillText(number, GUTTER - 8, HEAD + (row + 0.5) * height + 3);
    });
  }

  #outline(context) {
    const [layer, expert] = this.selected;
    const { cell, height } = this.metrics;
    context.strokeStyle = cssColor("--text");
    context.lineWidth = 2;
    context.strokeRect(expert * cell, HEAD + layer * height, cell - 1, height - 1);
  }

  #point(event) {
    if (!this.matrix) return;
    const { cell, height } = this.metrics;
    this.select(Math.floor((event.offsetY - HEAD) / height), Math.floor(event.offsetX / cell));
  }

  #key(event) {
    const [layer, expert] = this.selected ?? [0, -1];
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (!step || !this.matrix) return;
    event.preventDefault();
    this.select(layer + step[0], Math.max(0, expert + step[1]));
    const x = (this.selected?.[1] ?? 0) * this.metrics.cell;
    if (x < this.scroll.scrollLeft || x > this.scroll.scrollLeft + this.scroll.clientWidth - 20) {
      this.scroll.scrollLeft = x - this.scroll.clientWidth / 2;
    }
  }

  select(layer, expert) {
    if (!(layer in this.matrix) || !(expert in this.matrix[0])) return;
    if (this.selected?.[0] === layer && this.selected[1] === expert) return;
    this.selected = [layer, expert];
    this.draw();
    this.onSelect(layer, expert);
  }
}

/** Which of a ramp's 64 colors: an even share has the middle one, so that hot and cold differ in balanced layers, too. */
function stepOf(multiple, limit) {
  return Math.round(63 * (multiple <= 1 ? multiple / 2 : 0.5 + (multiple - 1) / (limit - 1) / 2));
}

/** Give a canvas its size in CSS pixels and return a context that draws in them, sharp on any screen. */
function fit(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

function label(context, align) {
  context.fillStyle = cssColor("--quiet");
  context.font = "11px system-ui, sans-serif";
  context.textAlign = align;
}
