"use strict";
// Runs in every page of the plugin; the page of a run has an element #run, which it fills and keeps up to date.
// What comes from the server is set as text, never as HTML.

const EVERY_MS = 3000;
const TEXT = { yes: "Yes.", no: "No." };
const STATES = {
  none: "not begun", running: "running", success: "done", failed: "failed", upstream_failed: "not run: an earlier step failed",
  skipped: "skipped", up_for_retry: "is tried again", up_for_reschedule: "waits", deferred: "waits", awaiting_input: "waits for a person",
  queued: "waits for a worker", scheduled: "waits for a worker", restarting: "restarts", removed: "removed",
};

// Inside of Airflow's UI (a frame of the same origin) follow its dark switch, and open its pages in its own window.
function joinAirflow() {
  if (window.parent === window) return;
  const shell = window.parent.document.documentElement;
  const follow = () => { document.documentElement.style.colorScheme = shell.classList.contains("dark") ? "dark" : "light"; };
  new MutationObserver(follow).observe(shell, { attributes: true, attributeFilter: ["class"] });
  follow();
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href]");
    if (!link || !new URL(link.href).pathname.includes("/dags/")) return;
    event.preventDefault();
    const own = window.parent.document.createElement("a");
    own.href = link.href;
    own.click();
  });
}

function element(name, parent, attributes = {}) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

// Only what has changed is touched, so that focus and a screen reader stay where they are.
function show(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function clock(iso) {
  return iso ? new Date(iso).toLocaleTimeString([], { hour12: false }) : "";
}

function lasted(from, to) {
  if (!from) return "";
  const seconds = Math.max(0, Math.round(((to ? new Date(to) : new Date()) - new Date(from)) / 1000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

function sized(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (bytes >= 1024 && power < units.length - 1) { bytes /= 1024; power += 1; }
  return `${bytes.toFixed(power ? 1 : 0)} ${units[power]}`;
}

function of(done, expected, format) {
  return expected === null ? format(done) : `${format(done)} of ${format(expected)}`;
}

function startPage(root) {
  const now = root.querySelector("#now");
  const field = (name) => root.querySelector(`#${name}`);
  const rows = new Map();
  let last = null;

  function row(table, key, cells) {
    if (!rows.has(key)) {
      const made = element("tr", field(table).querySelector("tbody"));
      const head = element("th", made, { scope: "row" });
      rows.set(key, { made, head, cells: cells.map(() => element("td", made)) });
    }
    const found = rows.get(key);
    cells.forEach((text, number) => show(found.cells[number], text));
    return found;
  }

  function link(parent, path, text) {
    const found = parent.querySelector("a") || element("a", parent);
    const href = root.dataset.root + path;
    if (found.getAttribute("href") !== href) found.setAttribute("href", href);
    show(found, text);
  }

  function tick() {
    if (!last) return;
    const parts = [];
    if (last.ended && last.started) parts.push(`Began ${clock(last.started)}, took ${lasted(last.started, last.finished)}.`);
    if (last.since) parts.push(`Since ${clock(last.since)} (${lasted(last.since)}).`);
    if (last.until) parts.push(`Until ${clock(last.until)}.`);
    if (!last.ended && last.started) parts.push(`The run began ${clock(last.started)} (${lasted(last.started)}).`);
    show(field("times"), parts.join(" "));
    for (const step of last.steps) {
      const ran = step.started && !["skipped", "upstream_failed"].includes(step.state);
      row("steps", `step ${step.task}`, [
        step.about, step.counts || STATES[step.state] || step.state,
        ran ? clock(step.started) : "", ran ? lasted(step.started, step.ended) : "",
      ]);
    }
  }

  function showFailure(failure) {
    field("failure").hidden = !failure;
    if (!failure) return;
    link(field("failed-task"), failure.url, failure.task);
    show(field("problem"), failure.problem);
    show(field("state-then"), failure.state);
    field("state-then").hidden = field("state-label").hidden = !failure.state;
    show(field("failed-next"), failure.next);
    field("failed-next").hidden = field("failed-next-label").hidden = !failure.next;
  }

  function render(status) {
    last = status;
    root.dataset.tone = status.tone;
    show(now, status.sentence);
    show(field("no-return"), status.no_return);
    field("abort").hidden = field("abort-label").hidden = !status.abort;
    if (status.abort) show(field("abort"), `${TEXT[status.abort.safe]} ${status.abort.text}`);
    show(field("next"), status.next);
    showFailure(status.failure);
    tick();
    for (const step of status.steps) {
      const made = row("steps", `step ${step.task}`, []);
      link(made.head, step.url, step.task);
      made.made.dataset.state = step.state;
    }
    field("clients").hidden = !status.clients.length;
    const listed = new Set(status.clients.map((each) => `client ${each.name}`));
    for (const [key, found] of rows) {
      if (key.startsWith("client ") && !listed.has(key)) { found.made.remove(); rows.delete(key); }
    }
    for (const each of status.clients) {
      const made = row("clients", `client ${each.name}`, [each.node, each.proven ? clock(each.at) : "not yet", each.seen]);
      show(made.head, each.name);
      made.made.dataset.state = each.proven ? "success" : "running";
    }
    field("progress").hidden = !status.progress.length;
    for (const each of status.progress) {
      const made = row("progress", `progress ${each.task}`, [
        each.percent === null ? "" : `${each.percent.toFixed(1)} %`,
        of(each.objects, each.objects_expected, (count) => count.toLocaleString("en")),
        of(each.bytes, each.bytes_expected, sized),
        each.doing === "ended" ? "" : `${Math.round(each.objects_s).toLocaleString("en")} objects/s, ${sized(each.bytes_s)}/s`,
        each.doing === "ended" ? "" : each.eta_s === null ? "not known" : `about ${lasted(new Date(Date.now() - each.eta_s * 1000))}`,
        [each.doing, each.because].filter(Boolean).join(", "),
      ]);
      show(made.head, each.task);
    }
  }

  async function update() {
    let wait = EVERY_MS;
    try {
      if (!document.hidden || !last) {
        const answer = await fetch("status", { cache: "no-store", credentials: "same-origin" });
        if (!answer.ok) throw new Error(answer.status === 401 || answer.status === 403 ? "log in again" : `answer ${answer.status}`);
        render(await answer.json());
        show(field("fresh"), last.ended ? "The run has ended: this page no longer updates itself." : `As of ${clock(new Date())}, updated every ${EVERY_MS / 1000} s.`);
      }
    } catch (error) {
      wait = 5 * EVERY_MS;
      show(field("fresh"), `Not up to date: ${error.message}. Trying again.`);
    }
    if (!last || !last.ended) setTimeout(update, wait);
  }

  update();
  setInterval(() => { if (last && !last.ended) tick(); }, 1000);
}

joinAirflow();
const run = document.querySelector("#run");
if (run) startPage(run);
