// What the feed tells, put on the page.

import { Chart, countAxis, percentAxis, showRing, showSpark } from "./charts.js";
import { Feed } from "./feed.js";
import { showSlowest, showWorkers } from "./tables.js";
import { byId, count, percent, plural, say, span } from "./words.js";

const NUM_POINTS = 300;
const NEWS_S = 60;

let points = [];
let version = "";

const hitChart = new Chart("hit-chart", "hit-reading", [{ name: "hit", words: "", shape: "area", read: (point) => point.hit_rate }], percentAxis);
const promptChart = new Chart(
  "prompt-chart",
  "prompt-reading",
  [
    { name: "cached", words: "cached", shape: "area", read: (point) => point.cached_per_s },
    { name: "computed", words: "computed", shape: "area", read: (point) => point.computed_per_s },
  ],
  countAxis,
);

const feed = new Feed("dashboard/events", {
  event(event) {
    ask(false);
    if (event.kind === "history") {
      points = event.points;
      version = event.version;
    } else if (event.kind === "now") {
      show(event.snapshot);
    } else if (event.kind === "slowest") {
      showSlowest(event.requests);
    }
  },
  refused() {
    say("refusal", feed.hasKey ? "This key is not known." : "");
    tell("bad", "an API key is needed");
    ask(true);
  },
  lost(why) {
    byId("board").classList.add("stale");
    tell("bad", `${why}; trying again`);
  },
});

function ask(isAsking) {
  byId("key").hidden = !isAsking;
  if (isAsking) byId("board").hidden = true;
}

function show(snapshot) {
  byId("board").hidden = false;
  byId("board").classList.toggle("stale", Boolean(snapshot.problem));
  points = [...points, snapshot.point].slice(-NUM_POINTS);
  showState(snapshot);
  showTiles(snapshot);
  showRing(snapshot.workers);
  showWorkers(snapshot.workers, snapshot.point.at);
  hitChart.show(points);
  promptChart.show(points);
}

function showState(snapshot) {
  const now = snapshot.point.at;
  const { broker, workers } = snapshot;
  const serving = workers.filter((worker) => worker.status === "ready").length;
  const lost = workers.filter((worker) => worker.status === "lost" && now - worker.gone_at < NEWS_S);
  const suspect = workers.filter((worker) => worker.status === "suspect");
  if (snapshot.problem) {
    const when = snapshot.heard_at === null ? "" : `, last heard ${span(now - snapshot.heard_at)} ago`;
    tell("bad", `Broker lost: ${snapshot.problem}${when}`);
  } else if (lost.length) {
    tell("bad", `Lost ${lost.map((worker) => worker.worker_id).join(", ")}; ${plural(serving, "worker")} left`);
  } else if (suspect.length) {
    tell("warn", `${suspect.map((worker) => worker.worker_id).join(", ")} silent`);
  } else {
    tell(serving ? "good" : "warn", serving ? `${plural(serving, "worker serves", "workers serve")}` : "no worker serves");
  }
  const facts = [`kvcache ${version}`];
  if (broker && !snapshot.problem) facts.push(`policy ${broker.policy}`, `broker ${broker.state}, up ${span(broker.uptime_s)}`);
  say("facts", facts.join(" · "));
}

function tell(tone, text) {
  byId("state").dataset.tone = tone;
  say("state", text);
  document.title = tone === "bad" ? `(!) kvcache: ${text}` : "kvcache";
}

function showTiles({ point, broker }) {
  const figure = (id, value) => say(id, point.is_known ? value : "–");
  const detail = (id, text) => say(`${id}-detail`, point.is_known ? text : "not known now");
  figure("hits", percent(point.hit_rate));
  detail("hits", `of prompt tokens; since start ${percent(broker?.hit_rate)}`);
  figure("tokens", count(point.tokens_per_s));
  detail("tokens", `and ${count(point.cached_per_s + point.computed_per_s)} of prompts`);
  figure("running", count(point.running));
  detail("running", `${point.waiting} waiting`);
  figure("requests", count(point.requests_per_s));
  detail("requests", `${count(broker?.requests ?? 0)} since start`);
  showSpark("hits-spark", points, (it) => it.hit_rate, 1);
  showSpark("tokens-spark", points, (it) => it.tokens_per_s);
  showSpark("running-spark", points, (it) => it.running + it.waiting);
  showSpark("requests-spark", points, (it) => it.requests_per_s);
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  const input = byId("secret");
  feed.useKey(input.value.trim());
  input.value = "";
});

feed.run();
