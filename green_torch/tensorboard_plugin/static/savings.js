// Savings: a planned run with each of the chosen runs' rates, on one grid, at one PUE and price.

import { UNITS, against, askRegions, commonUnit, departureOf, interval, isModelled } from "./data.js";
import { fill, foldable, h, inTurns, named } from "./dom.js";
import * as f from "./format.js";

const HOME = ["world", "FR", "SE", "DE", "US-CA", "US-TX", "IN", "aws:us-east-1", "gcp:europe-west1"]; // to look at elsewhere
const NOISY = 3; // a projection that may be so many times larger or smaller is none
const TOO_NOISY = "too noisy to project";
const PLAN = { from: 6, to: 14, start: 1e10 }; // powers of ten

export function mount(root, first) {
  let regions = null;
  let latest = first;
  const byCode = () => new Map((regions?.rows ?? []).map((row) => [row[0], Object.fromEntries(regions.columns.map((name, k) => [name, row[k]]))]));
  const again = () => latest && update(latest);
  askRegions().then((table) => {
    regions = table;
    options.replaceChildren(...table.rows.map(([code, place, g]) => h("option", { value: code }, `${place}, ${f.digits(g)} gCO2e/kWh`)));
    again();
  }).catch(() => fill(problem, "The table of regions could not be read; the runs' own grid is used."));

  const number = (key, properties) => h("input", { type: "number", class: "number", "data-key": key, ...properties });
  const set = (patch) => latest.set(patch);
  const positive = (event) => (Number(event.target.value) > 0 ? Number(event.target.value) : null);
  const options = h("datalist", { id: "regions" });
  const planSlide = h("input", { type: "range", "data-key": "plan slider", min: PLAN.from, max: PLAN.to, step: 0.05, "aria-label": "Planned amount of work, logarithmic", oninput: (event) => set({ plan: Number((10 ** Number(event.target.value)).toPrecision(2)) }) });
  const plan = number("plan", { min: 1, step: "any", id: "plan", oninput: (event) => positive(event) && set({ plan: positive(event) }) });
  const planWord = h("output", { for: "plan", class: "hint" });
  const region = h("input", { type: "text", list: "regions", id: "region", "data-key": "region", autocomplete: "off", spellcheck: "false", placeholder: "as measured", onchange: (event) => set({ region: event.target.value.trim() }) });
  const regionWord = h("p", { class: "hint" });
  const pueSlide = h("input", { type: "range", "data-key": "pue slider", min: 1, max: 2, step: 0.01, "aria-label": "PUE", oninput: (event) => set({ pue: Number(event.target.value) }) });
  const pue = number("pue", { min: 1, max: 5, step: 0.01, id: "pue", oninput: (event) => Number(event.target.value) >= 1 && set({ pue: Number(event.target.value) }) });
  const pueWord = h("p", { class: "hint" });
  const price = number("price", { min: 0, step: "any", id: "price", placeholder: "none", oninput: (event) => set({ price: event.target.value === "" ? null : Math.max(0, Number(event.target.value)) }) });
  const unitWord = h("label", { for: "plan" });
  const problem = h("p", { class: "caution" });
  const results = h("div", { class: "stack" });
  root.append(
    h("section", { class: "panel controls", "aria-label": "The planned run" },
      h("div", { class: "field" }, unitWord, h("div", { class: "pair" }, planSlide, plan), planWord),
      h("div", { class: "field" }, h("label", { for: "region" }, "Region"), h("div", { class: "pair" }, region, h("button", { type: "button", class: "quiet", onclick: () => set({ region: "", pue: null }) }, "As measured")), regionWord, options),
      h("div", { class: "field" }, h("label", { for: "pue" }, "PUE"), h("div", { class: "pair" }, pueSlide, pue), pueWord),
      h("div", { class: "field" }, h("label", { for: "price" }, "Price per kWh"), h("div", { class: "pair" }, price), h("p", { class: "hint" }, "in your own currency; of facility energy")),
      problem),
    results,
  );

  function put(input, value) {
    if (document.activeElement !== input && input.value !== String(value)) input.value = value;
  }

  let asked = 0;
  async function update(ctx) {
    latest = ctx;
    const unit = commonUnit(ctx.chosen);
    const { base } = ctx;
    const planned = ctx.state.plan ?? plannedOf(base, unit) ?? PLAN.start;
    const table = byCode();
    const typed = ctx.state.region;
    const place = typed ? table.get(typed) ?? [...table.values()].find((one) => one.code.toLowerCase() === typed.toLowerCase()) : null;
    const setPue = ctx.state.pue ?? place?.pue ?? null;
    const money = ctx.state.price ?? base.price;
    unitWord.textContent = `Planned ${UNITS[unit]}`;
    put(plan, planned);
    planWord.textContent = `${f.count(planned)} ${UNITS[unit]}`;
    put(planSlide, Math.log10(planned));
    put(region, typed);
    put(pue, setPue ?? base.pue ?? 1);
    put(pueSlide, setPue ?? base.pue ?? 1);
    put(price, money ?? "");
    region.setAttribute("aria-invalid", String(Boolean(typed && regions && !place)));
    regionWord.textContent = place
      ? `${place.place}: ${f.digits(place.g_per_kwh)} gCO2e/kWh, ${place.basis}${place.year ? `, ${place.year}` : ""}; ${regions.sources[place.source]}`
      : typed && regions ? `“${f.short(typed, 30)}” is in no table: type a country (FR), a subdivision (US-CA) or a cloud region (aws:us-west-2)`
        : base.grid ? `${f.digits(base.grid.g_per_kwh ?? 0)} gCO2e/kWh, ${f.short(base.grid.region, 60)}, as the baseline was measured` : "as each run was measured";
    pueWord.textContent = ctx.state.pue === null && place?.pue ? f.short(place.pue_source, 140) : ctx.state.pue === null ? f.short(base.pueSource, 140) : "as you set it";
    asked += 1;
    const mine = asked;
    const wanted = () => mine === asked && results.isConnected;
    const rows = await inTurns(ctx.chosen, (run) => project(ctx, run, unit, planned, place, setPue, money), wanted);
    const embodied = rows?.some((row) => row.embodied !== null);
    const drawn = rows && await inTurns(rows, (row) => rowOf(ctx, row, embodied, money), wanted);
    if (drawn) fill(results, saved(ctx, rows, money, unit), resultTable(rows, drawn, embodied, unit, planned, money), elsewhere(ctx, rows, table));
  }
  return { update };
}

/** planned_steps of the run, in units of work. */
const plannedOf = (run, unit) => (run.plannedSteps && run.perStep[unit] ? Math.round(run.plannedSteps * run.perStep[unit]) : null);

/** [value, low, high] of each quantity for so much planned work. */
function project(ctx, run, unit, planned, place, pue, price) {
  const scaled = (quantity, by) => {
    const found = run[quantity][unit];
    if (!found || !f.known(by)) return null;
    const [lo, hi] = interval(run, quantity, unit) ?? [null, null];
    return [found.value, lo, hi].map((value) => (value === null ? null : value * planned * by));
  };
  const facility = pue ?? run.pue ?? 1;
  const it = scaled("energy", 1 / f.J_PER_KWH);
  const kwh = scaled("energy", facility / f.J_PER_KWH);
  const perKwh = place ? place.g_per_kwh : run.grid?.g_per_kwh ?? ownIntensity(run);
  return {
    run,
    hours: scaled("time", 1 / 3600),
    it,
    kwh,
    grams: kwh && f.known(perKwh) ? kwh.map((value) => (value === null ? null : value * perKwh)) : null,
    money: kwh && f.known(price) ? kwh.map((value) => (value === null ? null : value * price)) : null,
    perKwh,
    facility,
    embodied: embodiedOf(run, unit, planned),
  };
}

/** Where the grid changed during the run: what its operational emissions come to. */
function ownIntensity(run) {
  const { operational_g: g, facility_energy_j: j } = run.totals;
  return f.known(g) && j > 0 ? g / (j / f.J_PER_KWH) : null;
}

function embodiedOf(run, unit, planned) {
  const { embodied_g: g, duration_s: seconds } = run.totals;
  return f.known(g) && seconds > 0 && run.time[unit] ? (g / seconds) * run.time[unit].value * planned : null;
}

const kwhText = (value) => f.wattHours(value === null ? null : value * f.J_PER_KWH);

/** Whether a figure is not known within a factor worth showing; as cli/comparison.py has it. */
const isNoisy = (found) => Boolean(found) && found[1] !== null && found[0] > 0 && (found[2] > NOISY * found[0] || found[1] < found[0] / NOISY);

function cellOf(found, format) {
  if (!found) return h("td", {}, f.UNKNOWN);
  if (isNoisy(found)) return h("td", {}, h("span", {}, TOO_NOISY));
  return h("td", {}, h("span", {}, format(found[0])), h("small", {}, found[1] === null ? "no interval" : f.span(format, found[1], found[2])));
}

function rowOf(ctx, row, embodied, price) {
  return h("tr", { class: row.run === ctx.base ? "is-base" : "" },
    h("th", { scope: "row" }, h("i", { class: "swatch", style: { "--c": ctx.color(row.run) } }), named(row.run.told, { class: "strong" }), row.run === ctx.base ? h("span", { class: "badge base" }, "baseline") : null),
    cellOf(row.hours, f.hours), cellOf(row.it, kwhText), cellOf(row.kwh, kwhText), cellOf(row.grams, f.grams),
    embodied ? h("td", {}, f.grams(row.embodied)) : null,
    f.known(price) ? cellOf(row.money, f.money) : null);
}

function resultTable(rows, drawn, embodied, unit, planned, price) {
  return h("section", { class: "panel holds-table", "aria-label": "The planned run with each" },
    h("h2", {}, `${f.count(planned)} ${UNITS[unit]} with each`),
    h("div", { class: "scroll", tabindex: 0, "data-scroll": "planned", role: "region", "aria-label": "Projection table" },
      foldable(h("table", { class: "projection" },
        h("thead", {}, h("tr", {}, ["Run", "Time", "IT energy", "Facility energy", "Emissions", embodied ? "Embodied" : null, f.known(price) ? "Money" : null].filter(Boolean).map((title) => h("th", { scope: "col" }, title)))),
        h("tbody", {}, drawn)))),
    h("p", { class: "note" }, `On the same device and at the same rates. Low to high: scatter between blocks, and the meter's bounds. Emissions are operational: facility energy × grid intensity.${rows.some((row) => isModelled(row.run)) ? " Where power was modelled, energy follows from time." : ""}${rows.some((row) => [row.hours, row.it].some(isNoisy)) ? ` Too noisy: the interval goes beyond a factor of ${NOISY} either way; train longer, on a machine that does nothing else.` : ""}`));
}

/** Where a difference lies if scatter, the meter's bounds and the sensors' gains are all off at once: their factors multiply, as in Comparison.saving. */
function allInAll(found) {
  if (!f.known(found.lo) || !f.known(found.hi)) return [null, null];
  const ratio = 1 + found.estimate;
  const pairs = [[found.lo, found.hi], found.instrument, found.gained].filter(Boolean);
  return [0, 1].map((end) => pairs.reduce((product, pair) => (product * (1 + pair[end])) / ratio, ratio) - 1);
}

function saved(ctx, rows, price, unit) {
  const base = rows.find((row) => row.run === ctx.base);
  const others = rows.filter((row) => row !== base);
  if (!others.length) return h("p", { class: "note lone" }, "Tick a second run to see what it would save.");
  return h("section", { class: "findings", "aria-label": "What would be saved", "aria-live": "polite" }, others.slice(0, 6).map((row) => {
    const energy = against(ctx.base, row.run, "energy", { nCompared: ctx.nCompared, force: ctx.state.force });
    const time = against(ctx.base, row.run, "time", { nCompared: ctx.nCompared, force: ctx.state.force });
    const of = (found, whole, format) => {
      const amount = whole?.[0];
      if (!amount || found.refused) return null;
      if (!found.distinguishable) return found.lo === null ? "no interval" : "can't be told apart";
      if (isNoisy(whole)) return TOO_NOISY;
      const [low, high] = allInAll(found);
      const more = found.estimate > 0;
      const [least, most] = more ? [low, high] : [-high, -low];
      const signed = (value) => format(value).replace("-", "−");
      const by = (end, small, large) => end * (end >= 0 ? small : large); // the extremes that both intervals allow, as Comparison.saving
      return [h("span", {}, `${format(Math.abs(found.estimate) * amount)}${more ? " more" : ""}`), f.known(low) && f.known(high) && f.known(whole[1]) ? h("small", {}, f.span(signed, by(least, whole[1], whole[2]), by(most, whole[2], whole[1]), " to ")) : null];
    };
    const departed = departureOf(ctx, row.run);
    const { refused } = energy;
    if (departed || (refused && time.refused)) {
      return h("div", { class: "card refused", style: { "--c": ctx.color(row.run) } }, h("p", { class: "claim" }, named(row.run.told), ": no saving is told"), h("p", { class: "detail" }, departed || refused));
    }
    const sure = !refused && energy.distinguishable;
    const grid = row.perKwh === base.perKwh && row.facility === base.facility;
    const lines = refused ? [] : [
      ["energy", of(energy, base.kwh, kwhText)],
      ["emissions", grid ? of(energy, base.grams, f.grams) : "different grids or PUEs: choose a region"],
      ["money", f.known(price) && grid ? of(energy, base.money, f.money) : null],
    ];
    lines.push(["time", time.refused ? null : of(time, base.hours, f.hours)]);
    const verb = refused ? "Energy is not compared" : sure ? (energy.estimate < 0 ? "Would save, against " : "Would cost more than ") : "Can't be told apart from ";
    return h("div", { class: `card ${sure ? (energy.estimate < 0 ? "good" : "bad") : "even"}`, style: { "--c": ctx.color(row.run) } },
      h("p", { class: "claim" }, named(row.run.told)),
      h("p", { class: "detail" }, verb, refused ? `: ${refused}` : named(ctx.base.told)),
      h("dl", { class: sure ? "amounts" : "amounts faded" }, lines.filter(([, text]) => text).map(([name, text]) => [h("dt", {}, name), h("dd", {}, text)])),
      isModelled(row.run) && !refused ? h("p", { class: "caution" }, "Energy follows from time: power was modelled.") : null,
      unit === "step" ? h("p", { class: "caution" }, "Counted by steps: the runs must do the same work in one.") : null);
  }));
}

function elsewhere(ctx, rows, table) {
  const best = rows.filter((row) => row.it && !isNoisy(row.it)).sort((a, b) => a.it[0] - b.it[0])[0];
  if (!best || !table.size) return null;
  const places = HOME.map((code) => table.get(code)).filter(Boolean);
  const of = (place) => best.it[0] * (ctx.state.pue ?? place.pue ?? best.run.pue ?? 1) * place.g_per_kwh;
  const top = Math.max(...places.map(of));
  return h("section", { class: "panel holds-table", "aria-label": "The same run elsewhere" },
    h("h2", {}, "The same run elsewhere: ", named(best.run.told)),
    h("div", { class: "scroll" }, h("table", { class: "projection elsewhere" },
      h("thead", {}, h("tr", {}, ["Region", "Grid", "PUE", "Emissions", ""].map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, places.map((place) => h("tr", {},
        h("th", { scope: "row" }, h("button", { type: "button", class: "link", "data-key": `region ${place.code}`, onclick: () => ctx.set({ region: place.code }) }, place.code === "world" ? place.place : `${place.place} (${place.code})`)),
        h("td", {}, `${f.digits(place.g_per_kwh)} g/kWh`, h("small", {}, place.basis)),
        h("td", {}, f.digits(ctx.state.pue ?? place.pue ?? best.run.pue ?? 1)),
        h("td", {}, f.grams(of(place))),
        h("td", { class: "meter" }, h("i", { style: { width: `${(100 * of(place)) / top}%` } }))))))),
    h("p", { class: "note" }, "Yearly means. Lifecycle and direct figures are not the same thing: compare regions of one basis."));
}
