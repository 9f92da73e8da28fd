// Compare: what was found, the table, the bars, and what the numbers rest on.

import { bars } from "./charts.js";
import { LAST_LOSSES, UNITS, against, cautions, commonUnit, departureOf, interval, isModelled, isPaired, methodOf, obstacles, samePeaks, statusOf } from "./data.js";
import { copy, fill, foldable, h, inTurns, named, turn } from "./dom.js";
import * as f from "./format.js";
import { sum } from "./stats.js";

const METHODS = {
  counter: ["counted", "joules from a hardware energy counter, with bounds"],
  sampled: ["sampled", "power readings, integrated: no bounds"],
  estimated: ["estimated", "a model such as TDP × load: not measured"],
  mixed: ["mixed", "some joules counted, some modelled"],
  "": ["no meter", "nothing measures energy here"],
};
const CARDS = 4;
const REFUSED = 2; // cards of what can't be compared; more are folded away
const MANY = 24; // rows: more are drawn before the rest

export const methodBadge = (method, more = "") => {
  const [word, meaning] = METHODS[method] ?? [method, ""];
  return h("span", { class: `badge ${method || "none"}`, title: more || meaning }, word);
};

export const statusBadge = (run) => {
  const status = statusOf(run);
  if (status === "completed") return null;
  return h("span", { class: `badge ${status}`, title: status === "silent" ? "no news for 15 minutes: it may have been killed" : "" }, status);
};

const confidenceOf = ({ confidence }) => `${Number((100 * confidence).toPrecision(4))} %`;
const less = (value) => (value < 0 ? "less" : "more");
const points = (value) => (value >= 1 ? `${f.digits(value + 1)} times as much` : `${f.change(value).replace(/^[−+]/, "")} ${less(value)}`);
const range = ({ lo, hi }) => (lo < 1 && hi < 1 ? `${f.change(lo).replace(" %", "")} to ${f.change(hi)}` : `×${f.digits(1 + lo)} to ×${f.digits(1 + hi)}`);

export function mount(root) {
  const findings = h("section", { class: "findings", "aria-label": "What was found", "aria-live": "polite" });
  const comparison = h("section", { class: "panel holds-table", "aria-label": "Comparison" });
  const charts = h("section", { class: "charts", "aria-label": "Bars" });
  const sources = h("section", { class: "panel", "aria-label": "Where the numbers come from" });
  root.append(findings, comparison, charts, sources);
  let asked = 0;
  const refusals = { open: false };
  return {
    async update(ctx) {
      asked += 1;
      const mine = asked;
      const wanted = () => mine === asked && comparison.isConnected;
      if (!await inTurns(ctx.chosen, (run) => run.unit, wanted)) return; // works out each run's figures
      const unit = commonUnit(ctx.chosen);
      const rows = await inTurns(ctx.chosen, (run) => figuresOf(ctx, run, unit), wanted);
      if (!rows) return;
      const columns = columnsOf(ctx, rows, unit);
      const ordered = sorted(rows, columns, ctx.state.sort);
      const drawn = await inTurns(ordered, (row) => rowOf(ctx, row, columns), wanted);
      if (!drawn) return;
      fill(findings, findingCards(ctx, rows, unit, refusals));
      fill(comparison, tableOf(ctx, rows, ordered, columns, drawn));
      if (rows.length > MANY) await turn();
      if (!wanted()) return;
      fill(charts, barsOf(ctx, unit));
      fill(sources, provenance(ctx));
    },
  };
}

/** A run's row: every number of it, and its differences against the baseline. */
function figuresOf(ctx, run, unit) {
  const isBase = run === ctx.base;
  const loss = ctx.losses.get(run.id) ?? null;
  const settings = { nCompared: ctx.nCompared, force: ctx.state.force };
  const own = run.energy[unit] || run.time[unit] ? unit : run.unit;
  return {
    run,
    isBase,
    unit: own,
    energy: run.energy[own]?.value ?? null,
    speed: run.time[own] ? 1 / run.time[own].value : null,
    power: run.power,
    mfu: run.mfu,
    hfu: run.hfu,
    memory: run.peakMemory,
    kwh: f.known(run.totalJ) ? run.totalJ / f.J_PER_KWH : null,
    grams: run.totalG,
    loss,
    dEnergy: isBase ? null : { ...against(ctx.base, run, "energy", settings), modelled: isModelled(run) && isModelled(ctx.base) },
    dTime: isBase ? null : against(ctx.base, run, "time", settings),
    departed: isBase ? "" : departureOf(ctx, run),
    cautions: isBase ? [] : cautions(ctx.base, run, ctx.state.force),
  };
}

/** `refusals`: whether those that can't be compared are unfolded, kept from one drawing to the next. */
function findingCards(ctx, rows, unit, refusals) {
  const others = rows.filter((row) => !row.isBase).sort((a, b) => worth(a) - worth(b));
  if (!others.length) {
    const [{ run, energy, grams }] = rows;
    return h("div", { class: "card", style: { "--c": ctx.color(run) } },
      h("p", { class: "claim" }, named(run.told), ` used ${f.wattHours(run.totalJ)}, ${f.grams(grams)}${energy === null ? "" : `, ${f.si(energy, "J")} a ${unit}`}.`),
      h("p", { class: "detail" }, ctx.runs.length > 1 ? "Tick a second run at the left to compare." : "Log a second run beside it to compare: another precision, kernel or batch size."));
  }
  const refused = others.filter((row) => worth(row) === NEVER);
  const folded = refused.length > REFUSED ? refused : [];
  const shown = others.slice(0, others.length - folded.length);
  const cards = (list) => [
    list.slice(0, CARDS).map((row) => card(ctx, row)),
    list.length > CARDS ? h("p", { class: "more" }, `and ${list.length - CARDS} more in the table`) : null,
  ];
  return [
    cards(shown),
    folded.length ? h("details", { class: "refusals", open: refusals.open, ontoggle: (event) => (refusals.open = event.target.open) },
      h("summary", { "data-key": "refusals" }, `${f.integer(folded.length)} runs can't be compared with `, named(ctx.base.told)),
      h("div", { class: "findings" }, cards(folded))) : null,
  ];
}

const NEVER = 4e9;

/** The best first: what saves most, then what costs more, what can't be told apart, what is another training, and what can't be compared. */
function worth({ dEnergy, dTime, departed }) {
  const main = dEnergy.refused || dEnergy.modelled ? dTime : dEnergy;
  if (main.refused) return NEVER;
  if (departed) return 3.5e9;
  if (!main.distinguishable) return 3e9;
  return main.estimate < 0 ? main.estimate : Math.min(2e9, main.estimate);
}

function card(ctx, { run, unit, dEnergy, dTime, departed, cautions: notes }) {
  const base = ctx.base;
  const per = `per ${unit}`;
  const modelled = isModelled(run) && isModelled(base);
  const byTime = modelled || (dEnergy.refused && !dTime.refused);
  const main = byTime ? dTime : dEnergy;
  const what = byTime ? "time" : "energy";
  let claim;
  let tone = "even";
  if (main.refused) {
    claim = [named(run.told), " can't be compared with ", named(base.told)];
    tone = "refused";
  } else if (!main.distinguishable) claim = [named(run.told), " and ", named(base.told), ` can't be told apart in ${what} ${per}`];
  else if (departed) {
    claim = [named(run.told), ` took ${points(main.estimate)} ${what} ${per} ${main.estimate >= 1 ? "as" : "than"} `, named(base.told), ", in another training: no saving is told"];
  } else {
    claim = [named(run.told), byTime ? " takes " : " uses ", h("strong", {}, `${points(main.estimate)} ${what}`), ` ${per} ${main.estimate >= 1 ? "as" : "than"} `, named(base.told)];
    tone = main.estimate < 0 ? "good" : "bad";
  }
  const lines = [];
  if (main.refused) lines.push(main.refused);
  else if (main.lo !== null) lines.push(`${main.note ? `${main.note.split(": ")[1]}; ` : ""}${confidenceOf(main)} interval ${range(main)}${main.nPairs ? `, ${main.nPairs} pairs of blocks` : ""}${main.instrument ? `; the meter's own bounds allow ${range({ lo: main.instrument[0], hi: main.instrument[1] })}` : ""}`);
  else lines.push(main.note);
  if (byTime && modelled && !dTime.refused) lines.push("Energy follows from time: power was modelled, not measured.");
  else if (byTime && dEnergy.refused && !dTime.refused) lines.push(`Energy is not compared: ${dEnergy.refused}.`);
  else if (!byTime && !dTime.refused) lines.push(`Time ${per}: ${dTime.distinguishable ? `${f.change(dTime.estimate)} (${range(dTime)})` : "can't be told apart"}`);
  return h("div", { class: `card ${tone}`, style: { "--c": ctx.color(run) } },
    h("p", { class: "claim" }, claim),
    lines.map((line) => h("p", { class: "detail" }, line)),
    [departed, ...notes].filter(Boolean).map((note) => h("p", { class: "caution" }, note)));
}

function columnsOf(ctx, rows, unit) {
  const mixed = rows.some((row) => row.unit !== unit);
  const ranked = samePeaks(ctx.chosen);
  const per = mixed ? "unit of work" : unit;
  return [
    { key: "run", title: "Run", sort: (row) => row.run.told, text: (row) => row.run.told, cell: (row) => runCell(ctx, row), csv: "run" },
    { key: "energy", title: `J/${per}`, hint: "IT energy of a typical training step, by its work; with the interval by the scatter between blocks and the meter's bounds", sort: (row) => row.energy,
      text: (row) => (row.energy === null ? f.UNKNOWN : `${f.si(row.energy, "J")}${mixed ? `/${row.unit}` : ""}`), sub: (row) => plusMinus(row.run, "energy", row.unit), csv: `energy_per_${per.replaceAll(" ", "_")}_j`, raw: (row) => row.energy },
    { key: "dEnergy", title: "Δ energy", hint: `against the baseline, per ${per}; 95 % interval below`, sort: (row) => row.dEnergy?.estimate ?? null, cell: (row) => differenceCell(row, row.dEnergy), text: (row) => differenceText(row, row.dEnergy), csv: "energy_difference", raw: (row) => row.dEnergy?.estimate ?? null, ends: (row) => row.dEnergy },
    { key: "speed", title: `${mixed ? "work" : UNITS[unit]}/s`, sort: (row) => row.speed, text: (row) => (row.speed === null ? f.UNKNOWN : f.si(row.speed, "").trim() + (mixed ? ` ${UNITS[row.unit]}` : "")), folded: (row) => f.si(row.power, "W"), csv: `${mixed ? "work" : UNITS[unit]}_per_s`, raw: (row) => row.speed },
    { key: "dTime", title: "Δ time", hint: `time per ${per} against the baseline; 95 % interval below`, sort: (row) => row.dTime?.estimate ?? null, cell: (row) => differenceCell(row, row.dTime), text: (row) => differenceText(row, row.dTime), csv: "time_difference", raw: (row) => row.dTime?.estimate ?? null, ends: (row) => row.dTime },
    { key: "power", title: "Power", sort: (row) => row.power, text: (row) => f.si(row.power, "W"), csv: "power_w", raw: (row) => row.power },
    { key: "mfu", title: "MFU", hint: ranked ? "model FLOPs over the peak's" : "These runs have different peaks, so their MFUs are not ranked: compare the model FLOP/s below", sort: ranked ? (row) => row.mfu : null,
      text: (row) => f.percent(row.mfu), sub: (row) => (row.run.modelFlopPerS === null ? null : h("span", { title: peakTitle(row.run) }, rate(row.run))), folded: (row) => (row.hfu === null ? null : `HFU ${f.percent(row.hfu)}`), csv: "mfu", raw: (row) => row.mfu },
    { key: "hfu", title: "HFU", hint: "FLOPs that ran, recomputation included, over the same peak", sort: ranked ? (row) => row.hfu : null, text: (row) => f.percent(row.hfu), csv: "hfu", raw: (row) => row.hfu },
    { key: "memory", title: "Memory", hint: "the most in use at once: the accelerator's, else the process's; of several ranks, rank zero's", sort: (row) => row.memory, text: (row) => f.bytes(row.memory), csv: "peak_memory_bytes", raw: (row) => row.memory },
    { key: "kwh", title: "Energy", hint: "the whole run, all phases, IT energy", sort: (row) => row.kwh, text: (row) => f.wattHours(row.run.totalJ), folded: (row) => f.grams(row.grams), csv: "energy_kwh", raw: (row) => row.kwh },
    { key: "grams", title: "Emissions", hint: "IT energy × PUE × grid intensity, and the embodied share where the run has one", sort: (row) => row.grams, text: (row) => f.grams(row.grams), csv: "emissions_g", raw: (row) => row.grams },
    { key: "loss", title: "Final loss", hint: ctx.usedLosses.length ? `${f.short(ctx.usedLosses.join(", "), 120)}: the mean over the last ${f.percent(LAST_LOSSES, 1)} of the points that TensorBoard keeps (at least one); below, its 95 % interval by their scatter` : "choose the tag under Loss vs energy", sort: (row) => row.loss?.mean ?? null, text: (row) => (!ctx.lossesReady || !ctx.losses.has(row.run.id) ? "…" : f.plain(row.loss?.mean)), sub: (row) => [f.known(row.loss?.lo) ? f.span((value) => f.plain(value, 3), row.loss.lo, row.loss.hi) : "", row.loss && ctx.usedLosses.length > 1 ? f.short(row.loss.tag, 30) : ""].filter(Boolean).join(" · ") || null, csv: "final_loss", raw: (row) => row.loss?.mean ?? null, ends: (row) => row.loss && { ...row.loss, note: `${row.loss.tag}: mean of ${row.loss.n} points from step ${row.loss.from}` } },
  ];
}

/** Model FLOP/s of the peak's, where one is known. */
function rate({ modelFlopPerS: own, peakFlopPerS: peak }) {
  const [value, unit] = f.si(own, "FLOP/s").split(" ");
  if (!f.known(peak)) return `${value} ${unit}`;
  const [top, topUnit] = f.si(peak, "FLOP/s").split(" ");
  return unit === topUnit ? `${value} of ${top} ${unit}` : `${value} ${unit} of ${top} ${topUnit}`;
}

const peakTitle = (run) => run.peaks.map((peak) => `${peak.device} ${peak.dtype}: ${f.si(peak.flop_per_s, "FLOP/s")} (${peak.basis}, ${peak.source})`).join("\n").slice(0, 800);

function plusMinus(run, quantity, unit) {
  const found = interval(run, quantity, unit);
  return found ? f.span((value) => f.si(value, "J"), found[0], found[1]) : "no interval";
}

function runCell(ctx, row) {
  return [
    h("i", { class: "swatch", style: { "--c": ctx.color(row.run) } }),
    named(row.run.told, { class: "strong" }),
    h("span", { class: "badges" }, methodBadge(methodOf(row.run)), row.isBase ? h("span", { class: "badge base" }, "baseline") : null, statusBadge(row.run)),
  ];
}

function differenceText(row, found) {
  if (row.isBase) return "baseline";
  if (found.refused) return "not comparable";
  if (!found.distinguishable) return found.note.split(":")[0];
  return `${f.change(found.estimate)} (${found.modelled ? "follows from time" : range(found)}${row.departed ? "; not the same training" : ""})`;
}

function differenceCell(row, found) {
  if (row.isBase) return h("span", { class: "faded" }, "baseline");
  if (found.refused) return h("span", { class: "refused", title: found.refused }, "not comparable");
  if (!found.distinguishable) {
    return [h("span", { class: "faded", title: found.note }, "can't be told apart"), h("small", {}, found.lo === null ? "one block" : range(found))];
  }
  if (found.modelled) return [h("span", { class: "faded" }, f.change(found.estimate)), h("small", { title: "power was modelled, not measured" }, "follows from time")];
  if (row.departed) return [h("span", { class: "faded", title: row.departed }, f.change(found.estimate)), h("small", {}, range(found))];
  const better = found.estimate < 0;
  return [h("span", { class: better ? "good" : "bad" }, h("span", { "aria-hidden": "true" }, better ? "▾ " : "▴ "), f.change(found.estimate)), h("small", {}, range(found))];
}

function sorted(rows, columns, sort) {
  const column = columns.find((one) => one.key === sort.key && one.sort);
  if (!column) return [...rows].sort((a, b) => b.isBase - a.isBase);
  const side = sort.down ? -1 : 1;
  return [...rows].sort((a, b) => {
    const [x, y] = [column.sort(a), column.sort(b)];
    if (x === null || y === null) return (x === null) - (y === null); // unknown last either way
    return side * (typeof x === "string" ? x.localeCompare(y) : x - y);
  });
}

function rowOf(ctx, row, columns) {
  return h("tr", { class: row.isBase ? "is-base" : "", "data-run": row.run.id.slice(0, 200), style: { "--c": ctx.color(row.run) } }, columns.map((column, k) => {
    const content = column.cell ? column.cell(row) : [h("span", {}, column.text(row)), column.sub ? h("small", {}, column.sub(row)) : null, column.folded ? h("small", { class: "folded" }, column.folded(row)) : null];
    return h(k ? "td" : "th", { scope: k ? null : "row", class: `col-${column.key}` }, content);
  }));
}

function tableOf(ctx, rows, ordered, columns, drawn) {
  const head = columns.map((column) => {
    const active = ctx.state.sort.key === column.key;
    const turn = () => ctx.set({ sort: { key: column.key, down: active && !ctx.state.sort.down } });
    return h("th", { scope: "col", class: `col-${column.key}`, "aria-sort": active && column.sort ? (ctx.state.sort.down ? "descending" : "ascending") : null },
      column.sort
        ? h("button", { type: "button", "data-key": `sort ${column.key}`, title: column.hint, onclick: turn }, column.title, h("span", { class: "arrow", "aria-hidden": "true" }, active ? (ctx.state.sort.down ? "↓" : "↑") : ""))
        : h("span", { title: column.hint, class: "unsorted" }, column.title));
  });
  const why = rows.filter((row) => !row.isBase).flatMap((row) => {
    const { firm, soft, carbon } = obstacles(ctx.base, row.run);
    const told = [firm, ...soft, carbon && `emissions only: ${carbon}`].filter(Boolean).join("; ");
    return told ? [h("li", {}, named(row.run.told), `: ${told}`)] : [];
  });
  const forced = ctx.state.force || rows.some((row) => !row.isBase && obstacles(ctx.base, row.run).soft.length);
  return [
    h("div", { class: "bar" },
      h("h2", {}, "Comparison"),
      h("span", { class: "grow" }),
      h("button", { type: "button", class: "quiet", "data-key": "copy csv", onclick: () => copy(csv(columns, ordered), "the table as CSV") }, "Copy CSV"),
      h("button", { type: "button", class: "quiet", "data-key": "copy markdown", onclick: () => copy(markdown(columns, ordered), "the table as Markdown") }, "Copy Markdown")),
    h("div", { class: "scroll", "data-scroll": "table", tabindex: 0, role: "region", "aria-label": "Comparison table" },
      foldable(h("table", { class: "comparison" }, h("thead", {}, h("tr", {}, head)), h("tbody", {}, drawn)))),
    why.length ? h("div", { class: "why" }, h("b", {}, "Not comparable with the baseline"), h("ul", {}, why.slice(0, 20)),
      forced ? h("label", { class: "check" }, h("input", { type: "checkbox", "data-key": "force", checked: ctx.state.force, onchange: (event) => ctx.set({ force: event.target.checked }) }), " Compare all the same") : null) : null,
    rows.length > 1 ? h("p", { class: "note" }, howMeasured(ctx, rows)) : null,
  ];
}

/** What the intervals are of: pairs of blocks where one comparison measured the runs in turn, else stretches of each. */
function howMeasured(ctx, rows) {
  const others = rows.filter((row) => !row.isBase);
  const together = others.filter((row) => isPaired(ctx.base, row.run));
  const all = ctx.nCompared > 1 ? `, for all ${ctx.nCompared} differences together` : "";
  const paired = "Measured in turn by one comparison: the intervals are of pairs of blocks, so that what changed on the machine meanwhile cancels";
  const apart = "from the scatter between stretches of each run past its first 3 steps, allowing for autocorrelation. These runs were not measured side by side: what changed on the machine between them (temperature, neighbours) is part of the difference";
  if (together.length === others.length) return `${paired}${all}.`;
  if (!together.length) return [`95 % intervals${all}, ${apart}; `, h("code", {}, "green-torch compare"), " measures side by side."];
  return [together.slice(0, 6).map((row, k) => [k ? ", " : "", named(row.run.told)]), together.length > 6 ? " and others" : "", `: ${paired[0].toLowerCase()}${paired.slice(1)}. The rest: intervals ${apart}.`];
}

const cell = (value) => {
  const safe = /^[=+\-@\t\r]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : value; // a spreadsheet would run it
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
};

function csv(columns, rows) {
  const head = columns.flatMap((column) => (column.ends ? [column.csv, `${column.csv}_lo`, `${column.csv}_hi`, `${column.csv}_note`] : [column.csv]));
  const lines = rows.map((row) => columns.flatMap((column) => {
    const value = column.raw ? column.raw(row) : column.text(row);
    const main = value === null ? "" : String(value);
    if (!column.ends) return [main];
    const found = column.ends(row);
    return [main, found?.lo ?? "", found?.hi ?? "", found?.refused ?? found?.note ?? ""];
  }));
  return [head, ...lines].map((line) => line.map((value) => cell(String(value))).join(",")).join("\n");
}

function markdown(columns, rows) {
  const safe = (text) => String(text).replace(/[\r\n]+/g, " ").replace(/[\\|`*_<>[\]]/g, "\\$&");
  const line = (cells) => `| ${cells.map(safe).join(" | ")} |`;
  return [line(columns.map((column) => column.title)), `|${columns.map((_, k) => (k ? "---:" : "---")).join("|")}|`, ...rows.map((row) => line(columns.map((column) => column.text(row))))].join("\n");
}

function barsOf(ctx, unit) {
  const chosen = ctx.chosen;
  const block = (title, note, chart) => h("div", { class: "panel" }, h("h2", {}, title), chart, note ? h("p", { class: "note" }, note) : null);
  const whiskers = (quantity) => (run) => {
    const [lo, hi] = interval(run, quantity, unit) ?? [null, null];
    return { name: run.told, color: ctx.color(run), bars: [{ value: run[quantity][unit]?.value ?? null, lo, hi }] };
  };
  const known = (rows) => rows.some((row) => row.bars.some((bar) => f.known(bar.value)));
  const energy = chosen.map(whiskers("energy"));
  const emissions = chosen.map(whiskers("emissions"));
  const both = chosen.some((run) => f.known(run.hfu));
  const use = chosen.map((run) => ({ name: run.told, color: ctx.color(run), bars: both ? [{ value: run.mfu }, { value: run.hfu, faint: true }] : [{ value: run.mfu }] }));
  return [
    known(energy) ? block(`Energy per ${unit}`, "Whiskers: scatter between blocks, and the meter's bounds where joules are counted.", bars({ label: `Energy per ${unit}`, rows: energy, format: (value) => f.si(value, "J") })) : null,
    known(emissions) ? block(`Emissions per ${unit}`, "", bars({ label: `Emissions per ${unit}`, rows: emissions, format: (value) => f.grams(value) })) : null,
    known(use) ? block(both ? "MFU and HFU" : "MFU", [both ? "Above MFU; below, lighter, HFU with what was recomputed." : "HFU is not known: nobody counted what ran.", samePeaks(chosen) ? "" : " Different peaks: not to be ranked by these."], bars({ label: "MFU and HFU", rows: use, format: (value) => f.percent(value) })) : null,
  ];
}

const SHOWN = 8;
const basisOf = (grid) => (grid.basis === "unknown" ? "basis not known" : grid.basis);

function provenance(ctx) {
  const all = ctx.state.allSources;
  const rows = (all ? ctx.chosen : ctx.chosen.slice(0, SHOWN)).map((run) => {
    const grid = run.grid;
    const energies = run.domains.length
      ? run.domains.map((domain) => h("span", { class: "source" }, methodBadge(domain.method, domain.source), ` ${short(domain)}`))
      : h("span", { class: "source" }, methodBadge(""), " nothing measures energy here");
    const notes = [
      run.excludedSteps ? `${f.integer(run.excludedSteps)} ${run.excludedSteps === 1 ? "step" : "steps"} excluded: FLOPs were counted in ${run.excludedSteps === 1 ? "it" : "them"}` : "no step excluded",
      run.job ? `${f.integer(run.job.reporting)} of ${f.integer(run.job.world_size)} ranks report: energy, emissions, MFU and HFU are the job's; rates are rank zero's, scaled to all by the totals; intervals, memory and the joules by device are rank zero's` : run.worldSize > 1 ? `of ${run.worldSize} processes, this one alone` : null,
      run.carriedJ ? `with ${f.wattHours(run.carriedJ)} of earlier segments` : null,
      ...Object.entries(run.flags).filter(([flag]) => flag !== "counted" && flag !== "split").map(([flag, n]) => `${flag.replaceAll("_", " ").replace(":", " on ")}: ${f.integer(n)} ${n === 1 ? "record" : "records"}`),
      ...run.warnings,
    ].filter(Boolean);
    return h("li", { style: { "--c": ctx.color(run) } },
      h("div", { class: "source-head" }, h("i", { class: "swatch" }), named(run.told, { class: "strong" }), statusBadge(run)),
      h("dl", {},
        h("dt", {}, "Device"), h("dd", {}, f.short(run.domains.map((domain) => domain.device).filter(Boolean).join(", ") || run.device || "not known", 120)),
        h("dt", {}, "Joules"), h("dd", {}, energies),
        h("dt", {}, "Grid"), h("dd", { title: grid?.source ?? "" }, grid ? `${f.digits(grid.g_per_kwh ?? 0)} gCO2e/kWh, ${f.short(grid.region, 60)} · ${basisOf(grid)}, ${grid.average === false ? "marginal" : "average"}${grid.year ? `, ${grid.year}` : ""}` : "by the run's intensity provider, at each moment",
          grid ? h("small", {}, f.short(grid.source ?? "", 110)) : null),
        h("dt", {}, "PUE"), h("dd", {}, `${run.pue ?? f.UNKNOWN}`, h("small", {}, f.short(run.pueSource, 110))),
        h("dt", {}, "Steps"), h("dd", {}, run.comparison ? `${f.integer(sum(run.comparison.blocks.map((block) => block.n_steps)))} in ${run.comparison.blocks.length} blocks of one comparison; ` : `${f.integer(run.steps)} typical; `, notes[0], notes.slice(1, 9).map((note) => h("small", {}, f.short(note, 200))))));
  });
  return [
    h("h2", {}, "Where the numbers come from"),
    h("ul", { class: "sources" }, rows),
    ctx.chosen.length > SHOWN ? h("button", { type: "button", class: "quiet", "data-key": "all sources", onclick: () => ctx.set({ allSources: !all }) }, all ? "Show fewer" : `Show all ${ctx.chosen.length}`) : null,
  ];
}

const short = (domain) => `${f.short(domain.name, 30)}${domain.energyJ === null ? "" : ` ${f.wattHours(domain.energyJ)}`}${domain.gainError ? `, sensor ±${f.percent(domain.gainError, 1)}` : ""}${domain.shared ? ", shared" : ""}`;
