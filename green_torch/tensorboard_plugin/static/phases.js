// Phases: where a run's energy went, and what of it was for nothing.

import { statusOf } from "./data.js";
import { fill, foldable, h, named } from "./dom.js";
import * as f from "./format.js";

const WORDS = { train: "training", eval: "evaluation", save: "saving", setup: "setup", paused: "paused", other: "other" };
const LISTED = 60; // runs
const TOTAL = "green/energy_total_kWh";

export function mount(root) {
  const body = h("div", { class: "stack" });
  root.append(body);
  let asked = 0;
  return {
    async update(ctx) {
      asked += 1;
      const mine = asked;
      const show = (done) => fill(body, tables(ctx, done));
      show(new Map());
      const resumed = ctx.chosen.filter((run) => f.known(run.resumedFrom));
      if (!resumed.length) return;
      const done = new Map();
      await Promise.all(resumed.map(async (run) => {
        try {
          done.set(run.id, doneAgain(run, (await ctx.scalars([run.id], [TOTAL])).get(run.id)[TOTAL]));
        } catch {
          // the table says that it is not known
        }
      }));
      if (mine === asked && ctx.state.view === "phases") show(done);
    },
  };
}

/**
 * Joules that earlier segments spent past the checkpoint: what they used in all, less the total at the checkpoint's step; null where that
 * was not seen. (TensorBoard itself drops the points of steps that come again.)
 */
function doneAgain(run, series) {
  const carried = run.job?.carried_energy_j ?? run.carriedJ;
  if (!series || run.startedS === null || !f.known(carried)) return null;
  const saved = series.step.map((step, k) => [step, series.wall_s[k], series.value[k]])
    .filter(([step, wall, value]) => step <= run.resumedFrom && wall < run.startedS && f.known(value)).at(-1);
  const until = run.resumedFrom < 0 ? 0 : saved ? saved[2] * f.J_PER_KWH : null;
  return until === null ? null : Math.max(0, carried - until);
}

function tables(ctx, done) {
  return [
    h("section", { class: "panel holds-table" }, h("h2", {}, "Phases"),
      h("div", { class: "scroll whole", tabindex: 0, "data-scroll": "phases", role: "region", "aria-label": "Phases table" }, h("table", { class: "projection phases" },
        h("thead", {}, h("tr", {}, ["Run", "Phase", "Times", "Duration", "Energy", "Share", "", "Emissions", "Power"].map((title) => h("th", { scope: "col" }, title)))),
        ctx.chosen.slice(0, LISTED).map((run) => h("tbody", {}, rowsOf(ctx, run))))),
      h("p", { class: "note" }, `Every joule of a run belongs to one phase; they sum to the run. Bounds, where joules are counted, below.${ctx.chosen.some((run) => run.job) ? " Of a job of several ranks, phases are rank zero's; its last row is the sum over the ranks that report." : ""}${ctx.chosen.length > LISTED ? ` The first ${LISTED} of ${ctx.chosen.length} runs: tick fewer to see the others.` : ""}`)),
    waste(ctx, done),
    putOff(ctx),
  ];
}

function rowsOf(ctx, run) {
  const total = run.totals.energy_j;
  const seen = run.phases.filter((phase) => phase.n_steps || phase.energy_j || phase.duration_s);
  const head = (rows) => h("th", { scope: "rowgroup", rowspan: rows }, h("i", { class: "swatch", style: { "--c": ctx.color(run) } }), named(run.told, { class: "strong" }));
  if (!seen.length) return h("tr", {}, head(1), h("td", { colspan: 8, class: "faded" }, "no record yet"));
  return [...seen, null, ...(run.job ? [run.job] : [])].map((phase, k, rows) => {
    const isJob = phase !== null && phase === run.job;
    const one = phase ?? { ...run.totals, n_steps: null };
    const share = !isJob && f.known(one.energy_j) && total > 0 ? one.energy_j / total : null;
    return h("tr", { class: phase && !isJob ? "" : "sum" },
      k ? null : head(rows.length),
      h("td", { class: "left" }, isJob ? `job, ${f.integer(run.job.reporting)} ranks` : phase ? WORDS[phase.phase] ?? f.short(phase.phase, 20) : run.job ? "rank 0" : "run"),
      h("td", {}, phase && !isJob ? f.integer(one.n_steps) : ""),
      h("td", {}, isJob ? "" : f.duration(one.duration_s)),
      h("td", {}, h("span", {}, f.wattHours(one.energy_j)), f.known(one.energy_lo_j) ? h("small", {}, f.span(f.wattHours, one.energy_lo_j, one.energy_hi_j)) : null),
      h("td", {}, isJob ? "" : f.percent(share)),
      h("td", { class: "meter" }, phase && share ? h("i", { style: { width: `${Math.min(100, 100 * share)}%`, "--c": ctx.color(run) } }) : null),
      h("td", {}, f.grams(one.emissions_g)),
      h("td", {}, isJob ? "" : f.known(one.energy_j) && one.duration_s > 0 ? f.si(one.energy_j / one.duration_s, "W") : f.UNKNOWN));
  });
}

/** What was put off for a cleaner grid: planned against realised; nothing where no chosen run was. */
function putOff(ctx) {
  const rows = ctx.chosen.flatMap((run) => run.deferrals.map((one) => ({ run, one })));
  if (!rows.length) return null;
  const cell = ({ saving, means: [mean, baseline] }, why) => h("td", {},
    h("span", {}, saving === null ? "not known" : f.percent(saving)),
    h("small", {}, saving === null ? f.short(why, 400) : `${f.digits(mean)} against ${f.digits(baseline)} gCO2e/kWh`));
  return h("section", { class: "panel holds-table" }, h("h2", {}, "Put off for a cleaner grid"),
    h("div", { class: "scroll" }, foldable(h("table", { class: "projection put-off" },
      h("thead", {}, h("tr", {}, ["Run", "How", "For", "Planned saving", "Realised saving", "Against", "Grid"].map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, rows.map(({ run, one }) => h("tr", {},
        h("th", { scope: "row" }, h("i", { class: "swatch", style: { "--c": ctx.color(run) } }), named(run.told, { class: "strong" })),
        h("td", { class: "left" }, h("span", {}, f.short(one.policy, 60)), one.idle ? h("small", {}, `idle draw ${f.percent(one.idle.share)} of that at work, ${f.short(one.idle.basis, 20)}`) : null),
        h("td", {}, f.duration(one.waitedS)),
        cell(one.planned, "nothing was known ahead"),
        cell(one.realised, one.unknown),
        h("td", { class: "left" }, h("span", {}, f.short(one.baseline, 60)), h("small", {}, `slack ${f.duration(one.slackS)}, work so far ${f.duration(one.workS)}`)),
        h("td", { class: "left" }, h("span", {}, f.short(one.grid[0] ?? f.UNKNOWN, 40)), h("small", {}, f.short(one.grid.slice(1).join(", "), 300))))))))),
    h("p", { class: "note" }, "Fractions of what the baseline would have emitted at a constant draw at work; realised: by the same provider's figures after the fact. Savings of one run overlap, each from its own plan on: the first is the run's."));
}

function waste(ctx, done) {
  const rows = ctx.chosen.flatMap((run) => {
    const status = statusOf(run);
    const used = run.job ?? run.totals; // of this segment
    const perJoule = used.energy_j > 0 && f.known(used.emissions_g) ? used.emissions_g / used.energy_j : null;
    const found = [];
    if (status === "failed" || status === "killed") found.push([run, `${status}: all that the run used`, used.energy_j ?? null, 1]);
    if (status === "silent") found.push([run, "no news for 15 minutes; all that it used, if it was killed", used.energy_j ?? null, 1]);
    if (f.known(run.resumedFrom)) {
      const joules = done.get(run.id) ?? null;
      found.push([run, `done again: steps after ${f.integer(run.resumedFrom)}, where it went on from a checkpoint`, joules, joules === null || !run.totalJ ? null : joules / run.totalJ]);
    }
    return found.map(([own, why, joules, share]) => ({ own, why, joules, share, grams: joules === null || perJoule === null ? null : joules * perJoule }));
  });
  return h("section", { class: "panel holds-table" }, h("h2", {}, "Wasted energy"),
    rows.length
      ? h("div", { class: "scroll" }, foldable(h("table", { class: "projection" },
        h("thead", {}, h("tr", {}, ["Run", "What", "Energy", "Share of the run", "Emissions"].map((title) => h("th", { scope: "col", class: title === "What" ? "left" : "" }, title)))),
        h("tbody", {}, rows.map(({ own, why, joules, share, grams }) => h("tr", {},
          h("th", { scope: "row" }, h("i", { class: "swatch", style: { "--c": ctx.color(own) } }), named(own.told, { class: "strong" })),
          h("td", { class: "left" }, why), h("td", {}, joules === null ? "not known" : f.wattHours(joules)), h("td", {}, f.percent(share)), h("td", {}, f.grams(grams))))))))
      : h("p", { class: "note" }, "None known: no chosen run failed, fell silent, or did steps again after a checkpoint."));
}
