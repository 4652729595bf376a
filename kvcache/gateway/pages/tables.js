// The workers' cards and the slowest requests. Cards are kept and changed in place; rows are made anew when they differ.

import { fill } from "./charts.js";
import { byId, bytes, count, make, percent, plural, seconds, span } from "./words.js";

const cards = new Map();
const opened = new Set();

export function showWorkers(workers, now) {
  const list = byId("workers");
  const present = new Set(workers.map((worker) => worker.worker_id));
  for (const [id, card] of cards) {
    if (present.has(id)) continue;
    card.element.remove();
    cards.delete(id);
  }
  workers.forEach((worker, index) => {
    let card = cards.get(worker.worker_id);
    if (!card) {
      card = makeCard(worker.worker_id);
      cards.set(worker.worker_id, card);
    }
    if (list.children[index] !== card.element) list.insertBefore(card.element, list.children[index] ?? null);
    fillCard(card, worker, now);
  });
  byId("no-workers").hidden = workers.length > 0;
}

function makeCard(id) {
  const field = (name) => make("span", { class: name });
  const names = ["status", "cache", "work", "hits", "index", "models"];
  const fields = Object.fromEntries(names.map((name) => [name, field(name)]));
  const held = make("i", { class: "held" });
  const cached = make("i", { class: "cached" });
  const element = make(
    "li",
    { class: "worker" },
    make("div", { class: "worker-head" }, make("strong", { title: id }, id), fields.status),
    make("div", { class: "meter" }, held, cached),
    fields.cache,
    fields.work,
    fields.hits,
    fields.index,
    fields.models,
  );
  return { element, fields, held, cached };
}

function fillCard({ element, fields, held, cached }, worker, now) {
  const isGone = worker.gone_at !== null || worker.status === "awaited";
  element.dataset.status = worker.status;
  element.dataset.worker = worker.worker_id;
  const blocks = Math.max(1, worker.num_blocks);
  held.style.width = `${(100 * worker.held_blocks) / blocks}%`;
  cached.style.width = `${(100 * worker.cached_blocks) / blocks}%`;
  fields.status.textContent = worker.gone_at === null ? worker.status : `${worker.status} ${span(now - worker.gone_at)} ago`;
  fields.models.textContent = worker.models;
  for (const name of ["cache", "work", "hits", "index", "models"]) fields[name].hidden = isGone;
  if (isGone) return;
  const memory = worker.kv_total_bytes ? `, ${bytes(worker.kv_used_bytes)} of KV` : "";
  fields.cache.textContent = `${percent(fill(worker))} full${memory}`;
  fields.work.textContent = `${worker.running} running, ${worker.waiting} waiting`;
  const hits = worker.hit_rate === null ? "" : `, hit rate ${percent(worker.hit_rate)}`;
  fields.hits.textContent = `${count(worker.tokens_per_s)} tokens/s${hits}`;
  fields.index.textContent = `${percent(worker.share)} of keys, index ${worker.index || "unknown"}`;
}

export function showSlowest(requests) {
  const longest = Math.max(...requests.map((request) => request.ttft_s), 0.001);
  byId("slowest").replaceChildren(...requests.map((request) => makeRow(request, longest)));
  byId("no-slowest").hidden = requests.length > 0;
}

function makeRow(request, longest) {
  const key = `${request.request_id} ${request.at}`;
  const bar = make("i", { class: "bar" });
  bar.style.width = `${Math.max(1, (100 * request.ttft_s) / longest)}%`;
  const summary = make(
    "summary",
    {},
    make("span", { class: "ttft" }, seconds(request.ttft_s), make("span", { class: "bar-track" }, bar)),
    make("span", { class: "where" }, request.worker_id || "no worker"),
    make("span", { class: "prompt" }, prompt(request)),
    make("span", { class: "outcome", "data-outcome": request.outcome }, request.outcome),
    make("time", { datetime: new Date(request.at * 1000).toISOString() }, new Date(request.at * 1000).toLocaleTimeString()),
  );
  const row = make("details", {}, summary, make("div", { class: "why" }, ...explain(request)));
  row.open = opened.has(key);
  row.addEventListener("toggle", () => (row.open ? opened.add(key) : opened.delete(key)));
  return row;
}

function prompt(request) {
  if (!request.prompt_tokens) return "not begun";
  return `${request.cached_tokens} of ${plural(request.prompt_tokens, "prompt token")} cached`;
}

function explain(request) {
  const routing = request.routing;
  const times = [`${seconds(request.total_s)} in all`, plural(request.completion_tokens, "token")];
  if (request.completion_tokens) {
    times.push(`waited ${seconds(request.queue_ms / 1000)}`, `prefill ${seconds(request.prefill_ms / 1000)}`);
  }
  if (request.resumes) times.push(`went on elsewhere ${plural(request.resumes, "time")}`);
  const facts = [
    make("p", {}, [request.model, ...times].filter(Boolean).join(", ")),
    make("p", { class: "request-id" }, `request ${request.request_id}`),
  ];
  if (!routing) return facts;
  const pulled = routing.pull_from ? `; the beginning is copied from ${routing.pull_from}` : "";
  const policy = routing.policy ? ` (policy ${routing.policy})` : "";
  const table = routing.candidates.length ? [candidates(request)] : [];
  return [make("p", { class: "reason" }, `${routing.reason}${policy}${pulled}`), ...facts, ...table];
}

function candidates({ routing }) {
  const head = ["worker", "load", "limit", "hit tokens", "queue", "prefill", "total", "index", "note"];
  const rows = routing.candidates.map((it) => [
    it.worker_id,
    it.load,
    it.limit.toFixed(1),
    it.hit_tokens,
    seconds(it.queue_s),
    it.prefill_s === null ? "" : seconds(it.prefill_s),
    it.total_s === null ? "" : seconds(it.total_s),
    it.index,
    it.note,
  ]);
  const cells = (tag, row) => make("tr", {}, ...row.map((value) => make(tag, {}, String(value))));
  const line = (row) => {
    const made = cells("td", row);
    made.classList.toggle("chosen", row[0] === routing.worker_id);
    return made;
  };
  const table = make("table", {}, make("thead", {}, cells("th", head)), make("tbody", {}, ...rows.map(line)));
  const more = routing.num_candidates - routing.candidates.length;
  const rest = more > 0 ? [make("p", {}, `and ${more} more`)] : [];
  return make("div", { class: "scroll" }, table, ...rest);
}
