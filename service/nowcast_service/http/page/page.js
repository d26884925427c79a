// The page: the list of trainings, one training, how the service is; kept up to date by server-sent events.
import { HeatMap, LossChart, short } from "./charts.js";

const $ = (id) => document.getElementById(id);
const rows = new Map(); // id -> row of the list
const lines = new Map(); // id -> its table row
let key = sessionStorage.getItem("nowcast-key"), training = null, stream = null, drawn = 0;
const loss = new LossChart($("loss"), $("read")), heat = new HeatMap($("heat"), $("heat-read"));

const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

class Refused extends Error {}

async function ask(path) {
  const reply = await fetch(path, { headers: headers() });
  if (reply.status === 401) throw new Refused("the key is not known");
  if (!reply.ok) throw new Error(((await reply.json().catch(() => null)) || {}).message || `status ${reply.status}`);
  return reply;
}

function make(tag, text, attributes = {}) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function connected(state, text) {
  const pill = $("connection");
  if (pill.textContent !== text) pill.textContent = text;
  pill.className = "pill " + state;
}

// ---------------------------------------------------------------- the key

function askForKey(why) {
  $("main").hidden = true; $("key").hidden = false; $("key-error").textContent = why || "";
  connected("bad", "a key is needed");
  $("key-value").focus();
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key-value").value.trim();
  sessionStorage.setItem("nowcast-key", key);
  $("key-value").value = "";
  start();
});

$("forget").addEventListener("click", () => { sessionStorage.removeItem("nowcast-key"); key = null; stream?.abort(); location.reload(); });

// ---------------------------------------------------------------- the list

function spark(values) {
  if (values.length < 2) return make("span", "");
  const low = Math.min(...values), span = Math.max(...values) - low || 1;
  const points = values.map((v, i) => `${(i / (values.length - 1) * 70).toFixed(1)},${(17 - (v - low) / span * 15).toFixed(1)}`).join(" ");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("width", "72"); svg.setAttribute("height", "19"); svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points);
  svg.append(line);
  return svg;
}

function line(row) {
  const tr = make("tr"), first = make("td"), name = make("a", row.name, { href: "#" + row.training });
  const state = row.state === "live" && row.mode !== "on" ? row.mode : row.state;
  first.append(name, make("small", `${row.network}, ${short(row.parameters)} parameters${row.device ? ", " + row.device : ""}`), make("small", state, { class: state }));
  const step = make("td", row.total_steps ? `${short(row.step)} of ${short(row.total_steps)}` : short(row.step));
  if (row.total_steps) step.append(make("progress", null, { max: row.total_steps, value: Math.min(row.step, row.total_steps), "aria-label": `progress of ${row.name}` }));
  const value = make("td", short(row.loss));
  value.append(spark(row.recent));
  const counts = row.counts, told = [["kept", counts.kept], ["undone", counts.rolled_back], ["skipped", counts.skipped], ["shadow", counts.shadow]].filter(([, n]) => n);
  const nowcasts = make("td", told.length ? told.map(([what, n]) => `${n} ${what}`).join(", ") : counts.patched ? `${counts.patched} patched` : "none yet");
  if (row.last) nowcasts.append(make("small", `last: ${row.last.kind.replace("_", " ")} at ${short(row.last.step)}`));
  tr.append(first, step, value, nowcasts);
  if (row.training === training?.training) tr.setAttribute("aria-current", "true");
  return tr;
}

function matches(row) {
  const wanted = $("filter").value.trim().toLowerCase();
  return !wanted || `${row.name} ${row.network} ${row.state} ${row.mode} ${row.training}`.toLowerCase().includes(wanted);
}

function list(changed) {
  const focused = document.activeElement?.getAttribute?.("href");
  const body = $("rows"), fresh = document.createDocumentFragment();
  for (const row of changed) {
    rows.set(row.training, row);
    const made = line(row), old = lines.get(row.training);
    made.hidden = !matches(row);
    lines.set(row.training, made);
    if (old) old.replaceWith(made); else fresh.append(made);
  }
  body.prepend(fresh);
  if (focused && document.activeElement === document.body) body.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  const live = [...rows.values()].filter((row) => row.state === "live").length;
  $("count").textContent = rows.size ? `(${live} live of ${rows.size})` : "";
  $("empty").hidden = rows.size > 0;
}

$("filter").addEventListener("input", () => { for (const [id, tr] of lines) tr.hidden = !matches(rows.get(id)); });

// ---------------------------------------------------------------- one training

async function open(id) {
  for (const [other, tr] of lines) { if (other === id) tr.setAttribute("aria-current", "true"); else tr.removeAttribute("aria-current"); }
  if (!id) { training = null; $("whole").hidden = true; $("detail-title").textContent = "Choose a training"; return; }
  try {
    training = await (await ask(`v1/trainings/${encodeURIComponent(id)}`)).json();
  } catch (error) {
    training = null; $("whole").hidden = true; $("detail-title").textContent = error.message;
    return;
  }
  $("whole").hidden = false;
  $("graph").replaceChildren(); $("graph-show").hidden = false;
  show();
}

function show() {
  const { counts } = training, judged = (counts.kept || 0) + (counts.rolled_back || 0);
  $("detail-title").textContent = training.name;
  $("facts").textContent = [training.network, `${short(training.parameters)} parameters`, training.device, training.optimizer, training.period && `a nowcast every ${short(training.period)} steps`,
    `started ${new Date(training.started * 1000).toLocaleString()}`].filter(Boolean).join(" · ");
  const asked = training.events.filter((event) => event.horizon);
  const figures = [["State", training.state === "live" ? `live, ${training.mode}` : training.state], ["Step", short(training.step)], ["Loss", short(training.loss)],
    ["Horizon", asked.length ? `${asked[asked.length - 1].horizon} strides` : "–"], ["Kept", judged ? `${counts.kept || 0} of ${judged}` : "–"]];
  $("figures").replaceChildren(...figures.map(([what, value]) => { const div = make("div"); div.append(make("dt", what), make("dd", value)); return div; }));
  const events = [...training.events].reverse().slice(0, 200);
  $("events").replaceChildren(...events.map((event) => {
    const tr = make("tr"), words = { rolled_back: "undone", nowcast: "arrived" };
    tr.append(make("td", short(event.step)), make("td", words[event.kind] || event.kind), make("td", event.horizon ?? ""), make("td", event.reason ?? ""));
    return tr;
  }));
  pictures();
}

function pictures() {
  cancelAnimationFrame(drawn);
  drawn = requestAnimationFrame(() => { if (training) { loss.show(training); heat.show(training); } });
}

$("log").addEventListener("change", () => { loss.log = $("log").checked; loss.draw(); });
addEventListener("resize", pictures);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", pictures);

async function save(format) {
  const data = await (await ask(`v1/trainings/${training.training}?format=${format}`)).blob();
  const link = make("a", null, { href: URL.createObjectURL(data), download: `nowcast-${training.training}.${format}` });
  link.click();
  URL.revokeObjectURL(link.href);
}
$("as-json").addEventListener("click", () => save("json"));
$("as-csv").addEventListener("click", () => save("csv"));

$("graph-show").addEventListener("click", async () => {
  $("graph-show").hidden = true;
  try {
    drawGraph(await (await ask(`v1/trainings/${training.training}/graph`)).json());
  } catch (error) {
    $("graph").textContent = error.message;
  }
});

// Ranges of neurons as boxes, step after step from left to right; blocks between them as curves.
function drawGraph(graph) {
  const columns = new Map();
  graph.ranges.forEach((range, i) => { if (!columns.has(range.group)) columns.set(range.group, []); columns.get(range.group).push(i); });
  const places = [], tall = (size) => 12 + 6 * Math.log2(1 + size);
  let x = 10, bottom = 0;
  for (const members of columns.values()) {
    let y = 10;
    for (const i of members) { const height = tall(graph.ranges[i].size); places[i] = { x, y, height }; y += height + 14; }
    bottom = Math.max(bottom, y);
    x += 120;
  }
  const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg");
  const shape = (tag, attributes, text) => { const node = document.createElementNS(space, tag); for (const [n, v] of Object.entries(attributes)) node.setAttribute(n, v); if (text) node.textContent = text; svg.append(node); return node; };
  svg.setAttribute("width", x); svg.setAttribute("height", bottom); svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${short(graph.nodes)} neurons in ${graph.ranges.length} ranges, ${short(graph.edges)} edges`);
  for (const link of graph.links) {
    const from = places[link.source], to = places[link.target];
    const a = [from.x + 60, from.y + from.height / 2], b = [to.x, to.y + to.height / 2], bend = Math.max(30, Math.abs(b[0] - a[0]) / 2);
    const curve = shape("path", { d: `M${a} C${a[0] + bend},${a[1]} ${b[0] - bend},${b[1]} ${b}`, fill: "none", stroke: link.type === "residual" ? "var(--none)" : "var(--raw)", "stroke-width": 1 + Math.log10(1 + link.edges) / 3 });
    curve.append(Object.assign(document.createElementNS(space, "title"), { textContent: `${link.type}, ${short(link.edges)} edges` }));
  }
  graph.ranges.forEach((range, i) => {
    const { x: left, y, height } = places[i];
    shape("rect", { x: left, y, width: 60, height, rx: 4 });
    shape("text", { x: left + 30, y: y + height / 2 + 4, "text-anchor": "middle" }, short(range.size));
  });
  $("graph").replaceChildren(svg);
}

// ---------------------------------------------------------------- as it happens

function heard(kind, data) {
  if (kind === "rows") {
    const changed = JSON.parse(data).trainings;
    list(changed);
    const row = training && changed.find((one) => one.training === training.training);
    if (row) { Object.assign(training, row); show(); }
  } else if (kind === "training" && training) {
    const news = JSON.parse(data);
    training.loss_steps.splice(news.first, Infinity, ...news.loss_steps);
    training.losses.splice(news.first, Infinity, ...news.losses);
    training.events.push(...news.events);
    training.movements.push(...news.movements);
    show();
  } else if (kind === "again" && training) open(training.training);
}

async function watch(id) {
  stream?.abort();
  const mine = (stream = new AbortController());
  let pause = 1000;
  while (!mine.signal.aborted) {
    try {
      const reply = await fetch("v1/watch" + (id ? `?training=${encodeURIComponent(id)}` : ""), { headers: headers(), signal: mine.signal });
      if (reply.status === 401) return askForKey("the key is not known");
      if (!reply.ok) throw new Error(`status ${reply.status}`);
      connected("good", "live");
      pause = 1000;
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ;) {
        const { value, done } = await reader.read();
        if (done) break;
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        for (const event of events) {
          const found = /^event: (\w+)\ndata: (.*)$/s.exec(event);
          if (found) heard(found[1], found[2]);
        }
      }
    } catch (error) {
      if (mine.signal.aborted) return;
    }
    connected("bad", "the service does not answer; trying again");
    await new Promise((wake) => setTimeout(wake, pause));
    pause = Math.min(15000, pause * 2);
    if (training && !mine.signal.aborted) await open(training.training);
  }
}

const bytes = (n) => (n >= 2 ** 30 ? (n / 2 ** 30).toFixed(1) + " GiB" : (n / 2 ** 20).toFixed(0) + " MiB");

async function health() {
  try {
    const s = await (await ask("v1/status")).json();
    const numbers = [["Device", s.device], ["Queue", `${s.queue} of ${s.queue_limit}${s.running ? `, running ${s.running.toFixed(1)} s` : ""}`, s.queue / s.queue_limit],
      ["Memory for histories", `${bytes(s.held)} of ${bytes(s.budget)}`, s.held / s.budget], ["Sessions", `${s.sessions} of ${s.sessions_limit}`, s.sessions / s.sessions_limit],
      ["Process", bytes(s.resident)], ["Up", `${(s.uptime / 3600).toFixed(1)} h`], ["Version", s.version]];
    $("service").replaceChildren(...numbers.map(([what, value, part]) => {
      const div = make("div"), told = make("dd", value);
      div.append(make("dt", what), told);
      if (part !== undefined) told.append(" ", make("meter", null, { min: 0, max: 1, low: 0.7, high: 0.9, optimum: 0, value: part.toFixed(3), "aria-label": `${what}: ${value}` }));
      return div;
    }));
  } catch (error) { /* the stream says that the service does not answer */ }
  setTimeout(health, 5000);
}

const chosen = () => decodeURIComponent(location.hash.slice(1));

addEventListener("hashchange", async () => { await open(chosen()); watch(chosen()); $("detail").focus({ preventScroll: true }); });

async function start() {
  try {
    await ask("v1/status");
  } catch (error) {
    if (error instanceof Refused) return askForKey(key ? "the key is not known" : "");
  }
  $("key").hidden = true; $("main").hidden = false; $("forget").hidden = !key;
  rows.clear(); lines.clear(); $("rows").replaceChildren();
  if (chosen()) await open(chosen());
  watch(chosen());
  health();
}

start();
