// Refreshes the live panel every second, and cancels a download midway. The page works without it.
"use strict";

(() => {
  const REFRESH_EVERY = 1000; // ms
  const CANCEL_AFTER = 1000; // ms

  const byId = (id) => document.getElementById(id);

  const setText = (element, text) => {
    // Only what has changed, so that nothing is read out or deselected for no reason.
    if (element.textContent !== String(text)) element.textContent = text;
  };

  const cell = (text, className = "") => {
    const td = document.createElement("td");
    td.className = className;
    td.textContent = text;
    return td;
  };

  const outcomeCell = (line) => {
    const td = document.createElement("td");
    const span = document.createElement("span");
    span.className = line.kind;
    span.textContent = line.outcome;
    td.append(span);
    if (line.attempts > 1) {
      const attempt = document.createElement("span");
      attempt.className = "attempt";
      attempt.textContent = `attempt ${line.attempts}`;
      td.append(" ", attempt);
    }
    return td;
  };

  const row = (line) => {
    const tr = document.createElement("tr");
    tr.append(
      cell(line.method),
      cell(line.path, "path"),
      cell(line.status),
      outcomeCell(line),
      cell(line.statements, "number"),
      cell(line.milliseconds.toFixed(1), "number"),
    );
    return tr;
  };

  let shown = "";
  let announced = null;

  const announce = (requests) => {
    const last = requests.find((line) => line.method !== "job" && line.kind !== "running");
    if (!last) return;
    if (announced !== null && last.number !== announced) {
      const attempt = last.attempts > 1 ? `, attempt ${last.attempts}` : "";
      setText(byId("news"), `${last.method} ${last.path}: ${last.status}, ${last.outcome}${attempt}`);
    }
    announced = last.number;
  };

  const show = (panel) => {
    const verdict = byId("verdict");
    verdict.className = panel.sound ? "note good" : "note bad";
    setText(verdict, panel.verdict);
    setText(byId("connections"), panel.connections);
    setText(byId("units"), panel.units);
    for (const [number, balance] of Object.entries(panel.balances)) {
      const field = document.querySelector(`[data-account="${number}"]`);
      if (field) setText(field, balance);
    }
    const requests = JSON.stringify(panel.requests);
    if (requests !== shown) {
      shown = requests;
      byId("requests").replaceChildren(...panel.requests.map(row));
      announce(panel.requests);
    }
  };

  const refresh = async () => {
    if (!document.hidden) {
      try {
        const response = await fetch("/panel.json", { signal: AbortSignal.timeout(5000) });
        if (!response.ok) throw new Error(response.status);
        show(await response.json());
        setText(byId("freshness"), "Live: refreshed every second.");
      } catch {
        setText(byId("freshness"), "The server does not answer. Still trying.");
      }
    }
    setTimeout(refresh, REFRESH_EVERY);
  };

  const addCancelButton = () => {
    const form = byId("cases-download");
    const button = document.createElement("button");
    button.type = "button";
    button.id = "download-and-cancel";
    button.textContent = "Download, then cancel";
    const news = document.createElement("p");
    news.className = "quiet";
    news.id = "download-news";
    news.setAttribute("role", "status");
    button.addEventListener("click", async () => {
      if (button.getAttribute("aria-disabled") === "true") return;
      button.setAttribute("aria-disabled", "true");
      setText(news, "Downloading…");
      const cancel = new AbortController();
      setTimeout(() => cancel.abort(), CANCEL_AFTER);
      let received = 0;
      try {
        const response = await fetch(form.action, {
          method: "POST",
          body: new URLSearchParams(new FormData(form)),
          signal: cancel.signal,
        });
        if (!response.ok) throw new Error(`the server answered ${response.status}`);
        const reader = response.body.getReader();
        for (;;) {
          const { done, value } = await reader.read();
          if (done) break;
          received += value.length;
        }
        setText(news, `Complete before it could be cancelled: ${received} bytes.`);
      } catch (error) {
        setText(
          news,
          error.name === "AbortError"
            ? `Cancelled after ${received} bytes; see the panel.`
            : `Not downloaded: ${error.message}.`,
        );
      }
      button.removeAttribute("aria-disabled");
    });
    form.append(" ", button);
    form.after(news);
  };

  addCancelButton();
  refresh();
})();
