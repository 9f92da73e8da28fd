// The page: its state, what is asked of the server, the list of runs, and the view that is open.

import * as compare from "./compare.js";
import { LAST_LOSSES, askRuns, askScalars, askTags, finalLoss, inGroups, likelyLoss, lossHomes, lossesFirst, pointsOf, statusOf } from "./data.js";
import { fill, h, named } from "./dom.js";
import { integer } from "./format.js";
import * as frontier from "./frontier.js";
import { followDarkMode, onAddress, onReload, readAddress, writeAddress } from "./host.js";
import * as phases from "./phases.js";
import * as savings from "./savings.js";
import * as timeline from "./timeline.js";

const VIEWS = [
  ["compare", "Compare", compare],
  ["savings", "Savings", savings],
  ["timeline", "Timeline", timeline],
  ["frontier", "Loss vs energy", frontier],
  ["phases", "Phases", phases],
];
const COLORS = 8;
const DASHES = [null, "6 3", "2 3", "8 3 2 3"];
const AT_FIRST = 8; // runs that are ticked without being asked for
const SOON_MS = 2000;
const LATER_MS = 10_000;
const LONG_ADDRESS = 40; // runs; more are asked for all at once
const LISTED = 300;
const NARROW = "(max-width: 860px)"; // as green.css has it: there the list would hide what it is for

const defaults = () => ({ view: "compare", selected: null, base: null, sort: { key: "", down: false }, loss: null, plan: null, region: "", pue: null, price: null, x: "time", zoom: null, focus: null, cumulative: "kwh", smooth: 0.6, target: null, filter: "", allSources: false, force: false });

let state = defaults();
let runs = []; // with a readable snapshot
let broken = [];
let nRuns = 0;
let phase = "loading"; // loading | ready | failed
let failure = "";
let lossTags = [];
let ownLoss = new Map(); // by run: the tag that is most likely its loss
let tagsReady = false;
let losses = new Map();
let lossesReady = false;
let lossAsked = 0;
let asking = null;
let settled = 0;
const scalars = new Map();
const place = {};

/** `early`: the runs, asked for while this code was on its way. */
export async function start(body, early) {
  followDarkMode();
  place.runs = h("aside", { class: "runs", "aria-label": "Runs" });
  place.tabs = h("nav", { class: "tabs", role: "tablist", "aria-label": "Views", onkeydown: arrows });
  place.view = h("main", { class: "view", id: "view", role: "tabpanel", tabindex: -1 });
  place.status = h("p", { class: "status", role: "status" });
  body.append(
    h("div", { class: "page" }, place.runs, h("div", { class: "work" }, h("div", { class: "top" }, place.tabs, place.status), place.view)),
    h("div", { id: "toast", role: "status", "aria-live": "polite" }),
  );
  read(readAddress());
  onAddress(() => {
    const before = [...(state.selected ?? []), state.loss].join("\n");
    read(readAddress());
    show();
    if ([...(state.selected ?? []), state.loss].join("\n") !== before) loadLosses();
  });
  onReload(() => load());
  show();
  await load(early);
  setTimeout(tick, SOON_MS);
}

/** The page's own clock, for the time when TensorBoard's reloading is switched off and for runs that go on. */
async function tick() {
  const visible = document.visibilityState === "visible" && document.documentElement.clientWidth > 0;
  const soon = phase !== "ready" || settled < 3 || !runs.length;
  if (visible && (soon || runs.some((run) => statusOf(run) === "running"))) await load();
  setTimeout(tick, soon ? SOON_MS : LATER_MS);
}

async function load(early = null) {
  if (asking) return asking;
  asking = (async () => {
    try {
      const before = [...runs, ...broken];
      const answer = await askRuns(before, early);
      const same = answer.nRuns === nRuns && answer.runs.length === before.length && answer.runs.every((run) => before.some((old) => old.id === run.id && old.digest === run.digest));
      settled = same ? settled + 1 : 0;
      nRuns = answer.nRuns;
      for (const run of answer.runs) if (!same || (!run.problem && statusOf(run) === "running")) lossHomes(run).forEach((home) => scalars.delete(home));
      const first = phase !== "ready";
      phase = "ready";
      if (!same || first) {
        runs = answer.runs.filter((run) => !run.problem);
        broken = answer.runs.filter((run) => run.problem);
        show();
        loadLosses();
      } else if (["timeline", "frontier"].includes(state.view) && runs.some((run) => statusOf(run) === "running")) showView();
    } catch (error) {
      [phase, failure] = [runs.length ? "ready" : "failed", error.message];
      if (phase === "failed") show();
      else place.status.textContent = `Not up to date: ${error.message}`;
    } finally {
      asking = null;
    }
  })();
  return asking;
}

/** The tags to choose a loss from, then each run's last value of it. */
async function loadLosses() {
  const homes = [...new Set(chosen().flatMap(lossHomes))];
  if (!homes.length) return;
  lossAsked += 1;
  const mine = lossAsked;
  try {
    const found = await askTags(homes.length > LONG_ADDRESS ? [] : homes);
    if (mine !== lossAsked) return;
    const tagsOf = (home) => (found[home] ?? []).filter((tag) => !/^green(_detail)?\//.test(tag));
    lossTags = lossesFirst(new Set(homes.flatMap(tagsOf)));
    ownLoss = new Map(chosen().map((run) => [run.id, likelyLoss(lossHomes(run).flatMap(tagsOf))]));
    tagsReady = true;
    const last = new Map(); // by home and tag
    await Promise.all([...new Set(chosen().map(lossOf))].filter(Boolean).flatMap((tag) => {
      const wanted = new Set(chosen().filter((run) => lossOf(run) === tag).flatMap(lossHomes));
      return inGroups([...wanted].filter((home) => found[home]?.includes(tag))).map(async (group) => {
        const curves = await askScalars(group, [tag], pointsOf(homes.length), LAST_LOSSES);
        for (const home of group) last.set(`${home}\n${tag}`, finalLoss(curves[home]?.[tag]));
      });
    }));
    if (mine !== lossAsked) return;
    const finalOf = (run, tag) => lossHomes(run).map((home) => last.get(`${home}\n${tag}`)).find(Boolean);
    losses = new Map(chosen().map((run) => [run.id, finalOf(run, lossOf(run)) ? { ...finalOf(run, lossOf(run)), tag: lossOf(run) } : null]));
    lossesReady = true;
  } catch {
    [tagsReady, lossesReady] = [true, true];
    losses = new Map(chosen().map((run) => [run.id, losses.get(run.id) ?? null]));
  }
  showView();
}

/** The tag that was chosen for all runs; "" where each goes by its own. */
const lossTag = () => (state.loss && (lossTags.includes(state.loss) || !tagsReady) ? state.loss : "");
const lossOf = (run) => lossTag() || ownLoss.get(run.id) || "";

/** Without a choice: the runs that were heard of last. */
function chosen() {
  if (state.selected) return runs.filter((run) => state.selected.has(run.id));
  if (runs.length <= AT_FIRST) return runs;
  const latest = [...runs].sort((a, b) => (b.wallS ?? 0) - (a.wallS ?? 0)).slice(0, AT_FIRST);
  return runs.filter((run) => latest.includes(run));
}

/** As asked for; else the run that another names as its baseline; else the first started. */
function baseOf(list) {
  const asked = list.find((run) => run.id === state.base);
  if (asked) return asked;
  const names = new Set(list.map((run) => run.manifest.baseline).filter(Boolean));
  return list.find((run) => names.has(run.id) || names.has(run.label) || names.has(run.name)) ?? [...list].sort((a, b) => (a.startedS ?? 0) - (b.startedS ?? 0))[0];
}

function context() {
  const list = chosen();
  return {
    state, runs, chosen: list, nCompared: Math.max(1, list.length - 1), base: baseOf(list), lossTags, lossTag: lossTag(), lossOf, losses,
    usedLosses: [...new Set(list.map(lossOf))].filter(Boolean),
    ownLosses: list.some((run) => ownLoss.get(run.id)), tagsReady, lossesReady, set,
    color,
    dash: (run) => DASHES[Math.floor(run.index / COLORS) % DASHES.length],
    scalars: series,
  };
}

const color = (run) => `var(--run-${run.index % COLORS})`;

/** Curves of runs by run and tag, asked for once until a run has news; `heard` is told of how many runs they are here. */
async function series(ids, tags, heard = () => {}) {
  const points = pointsOf(ids.length);
  const key = (tag) => `${points} ${tag}`;
  for (const id of ids) if (!scalars.has(id)) scalars.set(id, new Map());
  const missing = ids.filter((id) => tags.some((tag) => !scalars.get(id).has(key(tag))));
  for (const group of inGroups(missing)) {
    const answer = askScalars(group, tags, points);
    for (const id of group) {
      for (const tag of tags) {
        const curve = answer.then((found) => found[id]?.[tag]);
        curve.catch(() => scalars.delete(id)); // to be asked for again; whoever awaits it tells why
        scalars.get(id).set(key(tag), curve);
      }
    }
  }
  const kept = ids.map((id) => [id, tags.map((tag) => [tag, scalars.get(id).get(key(tag))])]);
  const found = new Map();
  for (const [id, curves] of kept) {
    found.set(id, Object.fromEntries(await Promise.all(curves.map(async ([tag, curve]) => [tag, await curve]))));
    heard(found.size);
  }
  return found;
}

function set(patch) {
  const list = "selected" in patch || "loss" in patch;
  state = { ...state, ...patch };
  writeAddress(settings());
  if (list || "base" in patch || "filter" in patch) showRuns();
  if ("view" in patch) showTabs();
  if (!("filter" in patch)) showView();
  if (list) loadLosses();
}

// ── the address ──

const joined = (ids) => [...ids].map(encodeURIComponent).join(",");
const parted = (text) => text.split(",").filter(Boolean).map(decodeURIComponent);

function settings() {
  const plain = defaults();
  const found = {};
  for (const key of ["view", "base", "loss", "plan", "region", "pue", "price", "x", "focus", "cumulative", "smooth", "target"]) {
    if (state[key] !== plain[key]) found[key] = String(state[key]);
  }
  if (state.selected) found.runs = joined(state.selected);
  if (state.sort.key) found.sort = `${state.sort.down ? "-" : ""}${state.sort.key}`;
  if (state.force) found.force = "1";
  if (state.zoom) found.zoom = `${Number(state.zoom.from.toPrecision(8))}:${Number(state.zoom.to.toPrecision(8))}`;
  return found;
}

function read(found) {
  const number = (text) => (text !== undefined && text !== "" && Number.isFinite(Number(text)) ? Number(text) : null);
  const next = { ...defaults(), filter: state.filter, allSources: state.allSources };
  if (VIEWS.some(([key]) => key === found.view)) next.view = found.view;
  try {
    if (found.runs !== undefined) next.selected = new Set(parted(found.runs));
  } catch {
    // a broken link: the default choice
  }
  for (const key of ["base", "loss", "focus"]) if (found[key] !== undefined) next[key] = found[key];
  for (const key of ["plan", "pue", "price", "target"]) next[key] = number(found[key]);
  if (next.plan !== null && next.plan <= 0) next.plan = null;
  if (next.pue !== null && next.pue < 1) next.pue = null;
  if (found.region) next.region = found.region.slice(0, 60);
  next.force = found.force === "1";
  if (found.x === "step") next.x = "step";
  if (found.cumulative === "grams") next.cumulative = "grams";
  if (number(found.smooth) !== null) next.smooth = Math.min(0.99, Math.max(0, number(found.smooth)));
  if (found.sort) next.sort = { key: found.sort.replace(/^-/, ""), down: found.sort.startsWith("-") };
  const zoom = (found.zoom ?? "").split(":").map(number);
  if (zoom.length === 2 && zoom[1] > zoom[0]) next.zoom = { from: zoom[0], to: zoom[1] };
  state = next;
}

// ── what is shown ──

function show() {
  showTabs();
  showRuns();
  showStatus();
  showView();
}

function showTabs() {
  fill(place.tabs, VIEWS.map(([key, word]) => h("button", { type: "button", role: "tab", id: `tab-${key}`, "data-key": `tab ${key}`, "aria-selected": String(state.view === key), "aria-controls": "view", tabindex: state.view === key ? 0 : -1, onclick: () => set({ view: key, zoom: null }) }, word)));
  place.view.setAttribute("aria-labelledby", `tab-${state.view}`);
}

function arrows(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const at = VIEWS.findIndex(([key]) => key === state.view);
  const to = event.key === "Home" ? 0 : event.key === "End" ? VIEWS.length - 1 : step ? (at + step + VIEWS.length) % VIEWS.length : null;
  if (to === null) return;
  event.preventDefault();
  set({ view: VIEWS[to][0], zoom: null });
  document.getElementById(`tab-${VIEWS[to][0]}`).focus();
}

function showStatus() {
  const going = runs.filter((run) => statusOf(run) === "running").length;
  const told = phase === "loading" ? "Reading…" : runs.length
    ? [`${integer(runs.length)} ${runs.length === 1 ? "run" : "runs"}`, nRuns > runs.length + broken.length ? `of ${integer(nRuns)} in TensorBoard` : "", going ? `· ${going} running` : "", settled < 1 && nRuns > runs.length ? "· still reading" : ""].filter(Boolean).join(" ")
    : "";
  place.status.textContent = told;
  place.status.classList.toggle("plain", /^[\d,]+ runs?$/.test(told));
}

function showRuns() {
  const list = chosen();
  const ticked = new Set(list.map((run) => run.id));
  const base = list.length ? baseOf(list) : null;
  const wanted = state.filter.toLowerCase();
  const listed = runs.filter((run) => !wanted || run.told.toLowerCase().includes(wanted) || run.id.toLowerCase().includes(wanted));
  const choose = (ids) => set({ selected: new Set(ids) });
  place.runs.hidden = !runs.length && !broken.length;
  fill(place.runs,
    h("details", { open: place.open ?? !matchMedia(NARROW).matches, ontoggle: (event) => (place.open = event.target.open) },
      h("summary", {}, h("span", {}, "Runs"), h("span", { class: "count" }, `${list.length} of ${runs.length}`)),
      runs.length > 6 ? h("input", { type: "search", class: "filter", "data-key": "filter", placeholder: "Filter runs", "aria-label": "Filter runs", value: state.filter, oninput: (event) => set({ filter: event.target.value }) }) : null,
      h("div", { class: "pick" },
        h("button", { type: "button", class: "link", "data-key": "all", onclick: () => choose(wanted ? [...ticked, ...listed.map((run) => run.id)] : runs.map((run) => run.id)) }, "All"),
        h("button", { type: "button", class: "link", "data-key": "none", onclick: () => choose(wanted ? [...ticked].filter((id) => !listed.some((run) => run.id === id)) : []) }, "None"),
        state.selected ? h("button", { type: "button", class: "link", "data-key": "latest", onclick: () => set({ selected: null }) }, runs.length > AT_FIRST ? "Latest" : "Reset") : null),
      h("ul", { class: "run-list", "data-scroll": "runs" }, listed.slice(0, LISTED).map((run) => h("li", { class: ticked.has(run.id) ? "ticked" : "" },
        h("label", { class: "run" },
          h("input", { type: "checkbox", checked: ticked.has(run.id), "data-key": `tick ${run.index}`, style: { "--c": color(run) }, onchange: (event) => {
            const next = new Set(ticked);
            if (event.target.checked) next.add(run.id);
            else next.delete(run.id);
            choose(next);
          } }),
          h("span", { class: "run-name" }, named(run.told), run.told !== run.id && run.id !== run.label ? h("small", {}, named(run.id || ".")) : null)),
        compare.statusBadge(run),
        ticked.has(run.id) ? h("button", { type: "button", class: run === base ? "as-base on" : "as-base", "data-key": `base ${run.index}`, "aria-pressed": String(run === base), "aria-label": `Use ${run.told.slice(0, 80)} as the baseline`, title: run === base ? "The baseline: what the others are compared with" : "Make it the baseline", onclick: () => set({ base: run.id }) }, run === base ? "baseline" : "set base") : null))),
      listed.length > LISTED ? h("p", { class: "note" }, `${listed.length - LISTED} more: filter by name`) : null,
      broken.length ? h("details", { class: "broken" }, h("summary", {}, `${broken.length} can't be read`), h("ul", {}, broken.slice(0, 50).map((run) => h("li", {}, named(run.id || "."), h("small", {}, run.problem))))) : null));
}

function showView() {
  const empty = phase !== "ready" || !runs.length ? blank() : !chosen().length ? h("div", { class: "empty" }, h("h2", {}, "No run is ticked"), h("p", {}, "Tick one or more at the left.")) : null;
  if (empty) {
    place.mounted = null;
    place.view.replaceChildren(empty);
    return;
  }
  if (place.mounted !== state.view) {
    place.view.replaceChildren();
    place.shown = VIEWS.find(([key]) => key === state.view)[2].mount(place.view, context());
    place.mounted = state.view;
  }
  place.shown.update(context());
}

const LOOP = `import green_torch

with green_torch.track(model, log_dir="runs/first") as tracker:
    for batch in loader:
        train_step(batch)
        tracker.step(tokens=batch.numel())`;
const LIGHTNING = `from green_torch.lightning import GreenMonitor

trainer = Trainer(callbacks=[GreenMonitor(region="FR")])`;

function blank() {
  if (phase === "loading") return h("div", { class: "empty loading" }, h("h2", {}, "Reading the runs…"), h("p", {}, "TensorBoard is asked for each run's snapshot."), h("div", { class: "skeleton", "aria-hidden": "true" }, h("i"), h("i"), h("i")));
  if (phase === "failed") {
    return h("div", { class: "empty" }, h("h2", {}, "TensorBoard does not answer"), h("p", {}, `${failure}. Is it still running? This page asks again every few seconds.`), h("button", { type: "button", onclick: () => load() }, "Ask now"));
  }
  if (broken.length) return h("div", { class: "empty" }, h("h2", {}, "No run can be read"), h("ul", {}, broken.slice(0, 10).map((run) => h("li", {}, named(run.id || "."), `: ${run.problem}`))));
  return h("div", { class: "empty" },
    h("h2", {}, nRuns ? "No green run yet" : "No runs yet"),
    h("p", {}, nRuns ? `TensorBoard shows ${integer(nRuns)} ${nRuns === 1 ? "run" : "runs"}, none of them with energy, as far as it has read. Wrap your loop, or add the callback:` : "TensorBoard has found no run in its log directory so far. Wrap your loop, or add the callback:"),
    h("div", { class: "snippets" }, h("pre", { tabindex: 0, "aria-label": "Your own loop" }, LOOP), h("pre", { tabindex: 0, "aria-label": "Lightning" }, LIGHTNING)),
    h("p", {}, "Or try it at once: ", h("code", {}, "green-torch demo --log-dir runs/demo"), ". This page looks again every few seconds."));
}
