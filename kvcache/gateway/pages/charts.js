// The ring, the sparklines and the two charts, as SVG.

import { byId, count, draw, percent, span } from "./words.js";

const CENTER = [200, 150];
const INNER = 72;
const OUTER = 104;
const MAX_LABELS = 12;
const SPARK_POINTS = 90;
const SPAN_S = 300;
const PAD = { left: 46, right: 10, top: 8, bottom: 22 };

export function showRing(workers) {
  const ring = byId("ring");
  const serving = workers.filter((worker) => worker.share > 0);
  const busiest = Math.max(1, ...serving.map(load));
  const parts = [draw("circle", { cx: CENTER[0], cy: CENTER[1], r: (INNER + OUTER) / 2, class: "track" })];
  let turn = 0;
  for (const worker of serving) {
    const from = turn;
    turn += worker.share;
    const gap = serving.length > 1 ? Math.min(0.006, worker.share / 4) : 0;
    parts.push(sector(worker, from + gap / 2, Math.min(turn - gap / 2, from + 0.99999), load(worker) / busiest));
    if (serving.length <= MAX_LABELS) parts.push(label(worker, (from + turn) / 2));
  }
  const number = draw("text", { x: CENTER[0], y: CENTER[1] + 4, class: "ring-number" }, String(serving.length));
  const word = draw("text", { x: CENTER[0], y: CENTER[1] + 24, class: "ring-word" }, "on the ring");
  ring.replaceChildren(...parts, number, word);
}

function load(worker) {
  return worker.running + worker.waiting;
}

function sector(worker, from, to, loadPart) {
  const blocks = Math.max(1, worker.num_blocks);
  const depth = OUTER - INNER;
  const held = INNER + (depth * worker.held_blocks) / blocks;
  const full = INNER + (depth * (worker.held_blocks + worker.cached_blocks)) / blocks;
  const title = `${worker.worker_id}: ${percent(worker.share)} of the keys, cache ${percent(fill(worker))} full`;
  const group = draw("g", { class: "sector", "data-status": worker.status }, draw("title", {}, title));
  group.append(draw("path", { d: band(INNER, OUTER, from, to), class: "empty-part" }));
  if (full > INNER + 0.3) group.append(draw("path", { d: band(INNER, full, from, to), class: "cached-part" }));
  if (held > INNER + 0.3) group.append(draw("path", { d: band(INNER, held, from, to), class: "held-part" }));
  const line = draw("path", { d: band(OUTER + 5, OUTER + 9, from, to), class: "load-part" });
  line.setAttribute("opacity", (0.12 + 0.88 * loadPart).toFixed(2));
  group.append(line);
  return group;
}

export function fill(worker) {
  return worker.num_blocks ? (worker.held_blocks + worker.cached_blocks) / worker.num_blocks : 0;
}

function label(worker, middle) {
  const [x, y] = spot(OUTER + 18, middle);
  const side = Math.abs(x - CENTER[0]) < 12 ? "middle" : x > CENTER[0] ? "start" : "end";
  const name = worker.worker_id.length > 9 ? `${worker.worker_id.slice(0, 8)}…` : worker.worker_id;
  return draw("text", { x: x.toFixed(1), y: (y + 4).toFixed(1), "text-anchor": side, class: "ring-label" }, name);
}

// Between two radii, clockwise from the top; turns are 0 to 1.
function band(low, high, from, to) {
  const large = to - from > 0.5 ? 1 : 0;
  const at = (radius, turn) => spot(radius, turn).map((value) => value.toFixed(2)).join(" ");
  return [
    `M${at(high, from)}A${high} ${high} 0 ${large} 1 ${at(high, to)}`,
    `L${at(low, to)}A${low} ${low} 0 ${large} 0 ${at(low, from)}Z`,
  ].join("");
}

function spot(radius, turn) {
  const angle = (turn - 0.25) * 2 * Math.PI;
  return [CENTER[0] + radius * Math.cos(angle), CENTER[1] + radius * Math.sin(angle)];
}

export function showSpark(id, points, read, most = null) {
  const values = points.slice(-SPARK_POINTS).map((point) => (point.is_known ? read(point) : null));
  const top = most ?? Math.max(1, ...values.filter((value) => value !== null)) * 1.1;
  const spark = byId(id);
  spark.setAttribute("viewBox", "0 0 100 30");
  spark.setAttribute("preserveAspectRatio", "none");
  const step = 100 / (SPARK_POINTS - 1);
  const start = 100 - step * (values.length - 1);
  const at = values.map((value, index) => (value === null ? null : [start + index * step, 29 - (27 * value) / top]));
  spark.replaceChildren(...runs(at).map((run) => draw("path", { d: path(run), class: "spark-line" })));
}

// series: [{name, read, shape: "line" or "area"}], areas are stacked in their order; axis: {most or null, words}.
export class Chart {
  constructor(id, readingId, series, axis) {
    this.svg = byId(id);
    this.reading = byId(readingId);
    this.series = series;
    this.axis = axis;
    this.points = [];
    this.pointer = null;
    this.svg.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.show(this.points)).observe(this.svg);
  }

  point(x) {
    this.pointer = x;
    this.show(this.points);
  }

  show(points) {
    this.points = points;
    const width = this.svg.clientWidth;
    const height = this.svg.clientHeight;
    if (!points.length || !width) return;
    const end = points[points.length - 1].at;
    const most = this.axis.most ?? nice(Math.max(1, ...points.map((point) => this.total(point))));
    const x = (at) => PAD.left + (1 - (end - at) / SPAN_S) * (width - PAD.left - PAD.right);
    const y = (value) => height - PAD.bottom - (value / most) * (height - PAD.top - PAD.bottom);
    const seen = points.filter((point) => end - point.at <= SPAN_S);
    this.svg.replaceChildren(...this.grid(width, height, most, y), ...this.shapes(seen, x, y), ...this.cursor(seen, x, height));
  }

  total(point) {
    return this.series.reduce((sum, series) => sum + (series.read(point) ?? 0), 0);
  }

  grid(width, height, most, y) {
    const rows = [0, most / 2, most].flatMap((value) => [
      draw("line", { x1: PAD.left, x2: width - PAD.right, y1: y(value), y2: y(value), class: "grid" }),
      draw("text", { x: PAD.left - 6, y: y(value) + 4, "text-anchor": "end", class: "tick" }, this.axis.words(value)),
    ]);
    const foot = { y: height - 5, class: "tick" };
    return [
      ...rows,
      draw("text", { ...foot, x: PAD.left }, "5 min ago"),
      draw("text", { ...foot, x: width - PAD.right, "text-anchor": "end" }, "now"),
    ];
  }

  shapes(points, x, y) {
    const floors = points.map(() => 0);
    return this.series.flatMap((series) => {
      const low = points.map((point, index) => [x(point.at), y(floors[index])]);
      const high = points.map((point, index) => {
        const value = point.is_known ? series.read(point) : null;
        if (value === null) return null;
        floors[index] += value;
        return [x(point.at), y(floors[index])];
      });
      const found = runs(high).flatMap((run) => {
        const line = draw("path", { d: path(run), class: `line ${series.name}` });
        if (series.shape === "line") return [line];
        const floor = low.filter(([at]) => at >= run[0][0] && at <= run[run.length - 1][0]).reverse();
        return [draw("path", { d: `${path(run)}L${path(floor).slice(1)}Z`, class: `area ${series.name}` }), line];
      });
      return found;
    });
  }

  cursor(points, x, height) {
    const last = points[points.length - 1];
    if (this.pointer === null) {
      this.read(last, "now");
      return [];
    }
    const near = (best, point) => (Math.abs(x(point.at) - this.pointer) < Math.abs(x(best.at) - this.pointer) ? point : best);
    const point = points.reduce(near, last);
    this.read(point, `${span(last.at - point.at)} ago`);
    return [draw("line", { x1: x(point.at), x2: x(point.at), y1: PAD.top, y2: height - PAD.bottom, class: "cursor" })];
  }

  read(point, when) {
    this.reading.replaceChildren(
      ...this.series.map((series) => {
        const item = document.createElement("span");
        item.className = `key-of ${series.name}`;
        item.textContent = `${series.words} ${point.is_known ? this.axis.words(series.read(point)) : "not known"}`;
        return item;
      }),
      document.createTextNode(when),
    );
  }
}

// Points without the holes between them.
function runs(points) {
  const found = [];
  let run = [];
  for (const point of [...points, null]) {
    if (point !== null) {
      run.push(point);
    } else if (run.length) {
      found.push(run);
      run = [];
    }
  }
  return found;
}

function path(points) {
  const text = points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
  return points.length > 1 ? `M${text}` : `M${text}h0.1`;
}

function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 4, 5, 10].find((step) => step * power >= value);
}

export const percentAxis = { most: 1, words: percent };
export const countAxis = { most: null, words: count };
