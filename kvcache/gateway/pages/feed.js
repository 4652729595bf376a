// Server-sent events over fetch, because EventSource cannot send a key. Tries again for ever; rests while hidden.

const SILENT_MS = 12000;
const LEAST_WAIT_MS = 500;
const MOST_WAIT_MS = 4000;
const KEY = "kvcache-api-key";

export class Feed {
  // handlers: event(data), refused(status), lost(why)
  constructor(url, handlers) {
    this.url = url;
    this.handlers = handlers;
    this.isAsking = false;
    this.abort = null;
    this.wake = () => {};
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.abort?.abort();
      else this.wake();
    });
  }

  useKey(key) {
    sessionStorage.setItem(KEY, key);
    this.isAsking = false;
    this.wake();
  }

  get hasKey() {
    return sessionStorage.getItem(KEY) !== null;
  }

  async run() {
    let wait = LEAST_WAIT_MS;
    for (;;) {
      if (document.hidden || this.isAsking) {
        await this.rest(3600000);
        continue;
      }
      let hasSpoken = false;
      try {
        hasSpoken = await this.listen();
      } catch (error) {
        if (!document.hidden) this.handlers.lost("the gateway does not answer");
      }
      wait = hasSpoken ? LEAST_WAIT_MS : Math.min(wait * 2, MOST_WAIT_MS);
      if (!this.isAsking && !document.hidden) await this.rest(wait);
    }
  }

  rest(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  // Until the stream ends; whether anything was heard.
  async listen() {
    const abort = (this.abort = new AbortController());
    let watchdog = setTimeout(() => abort.abort(), SILENT_MS);
    let hasSpoken = false;
    try {
      const key = sessionStorage.getItem(KEY);
      const headers = key ? { authorization: `Bearer ${key}` } : {};
      const response = await fetch(this.url, { headers, signal: abort.signal, cache: "no-store" });
      if (!response.ok) {
        this.refuse(response.status);
        return false;
      }
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        clearTimeout(watchdog);
        watchdog = setTimeout(() => abort.abort(), SILENT_MS);
        const parts = (text + value).split("\n\n");
        text = parts.pop();
        for (const part of parts) {
          if (!part.startsWith("data: ")) continue;
          this.handlers.event(JSON.parse(part.slice(6)));
          hasSpoken = true;
        }
      }
      if (!document.hidden) this.handlers.lost("the gateway has closed the connection");
      return hasSpoken;
    } finally {
      clearTimeout(watchdog);
    }
  }

  refuse(status) {
    if (status === 401) {
      this.isAsking = true;
      this.handlers.refused();
    } else {
      this.handlers.lost(status === 429 ? "too many dashboards are open" : `the gateway answers ${status}`);
    }
  }
}
