// Loss vs energy: which run learns most for a kilowatt-hour, or a gram.

import { lines } from "./charts.js";
import { lossHomes, pointsOf } from "./data.js";
import { fill, h, inTurns, named } from "./dom.js";
import * as f from "./format.js";
import { legend } from "./timeline.js";

const AXES = {
  kwh: { tag: "green/energy_total_kWh", word: "energy", scale: 1000, format: (value) => f.si(value, "Wh") },
  grams: { tag: "green/emissions_total_gCO2e", word: "emissions", scale: 1, format: (value) => f.grams(value) },
};

export function mount(root) {
  let latest = null;
  const tagPick = h("select", { id: "loss", "data-key": "loss", onchange: (event) => latest.set({ loss: event.target.value || null, target: null }) });
  const axis = (value, word) => h("button", { type: "button", class: "segment", "data-key": `cumulative ${value}`, onclick: () => latest.set({ cumulative: value, zoom: null }) }, word);
  const kwh = axis("kwh", "energy");
  const grams = axis("grams", "emissions");
  const smooth = h("input", { type: "range", id: "smooth", min: 0, max: 0.99, step: 0.01, "data-key": "smooth", oninput: (event) => latest.set({ smooth: Number(event.target.value) }) });
  const all = h("button", { type: "button", class: "quiet", "data-key": "show all", onclick: () => latest.set({ zoom: null }) }, "Show all");
  const body = h("div", { class: "stack" });
  root.append(
    h("div", { class: "bar tools" }, h("label", { for: "loss" }, "Loss"), tagPick, h("span", { class: "segments", role: "group", "aria-label": "Horizontal axis" }, kwh, grams), h("label", { for: "smooth" }, "Smoothing"), smooth, h("span", { class: "grow" }), all),
    body,
  );
  let asked = 0;
  return {
    async update(ctx) {
      latest = ctx;
      tagPick.replaceChildren(h("option", { value: "" }, !ctx.tagsReady ? "reading…" : !ctx.lossTags.length ? "no scalars" : ctx.ownLosses ? "each run's own" : "choose a tag"), ...ctx.lossTags.map((tag) => h("option", { value: tag }, f.short(tag, 60))));
      tagPick.value = ctx.lossTag;
      kwh.setAttribute("aria-pressed", String(ctx.state.cumulative === "kwh"));
      grams.setAttribute("aria-pressed", String(ctx.state.cumulative === "grams"));
      if (document.activeElement !== smooth) smooth.value = ctx.state.smooth;
      all.disabled = !ctx.state.zoom;
      asked += 1;
      const mine = asked;
      if (!ctx.usedLosses.length) {
        fill(body, !ctx.tagsReady ? h("p", { class: "loading" }, "Reading the runs' tags…") : h("div", { class: "empty" }, h("h2", {}, "Which tag is the loss?"), h("p", {}, ctx.lossTags.length ? "None of the scalars of these runs is named like one: choose it above." : "These runs have logged no loss. Log it beside: tracker.writer.add_scalar(\"loss\", loss, step), or let your trainer's logger do it.")));
        return;
      }
      const progress = h("p", { class: "loading" }, "Reading the runs' curves…");
      if (!body.childElementCount) fill(body, progress);
      try {
        const homes = [...new Set(ctx.chosen.flatMap(lossHomes))];
        const found = await ctx.scalars(homes, [AXES[ctx.state.cumulative].tag, ...ctx.usedLosses], (n) => (progress.textContent = `Reading the runs' curves: ${n} of ${homes.length}…`));
        const curves = await inTurns(ctx.chosen, (run) => curveOf(ctx, run, found), () => mine === asked && body.isConnected);
        if (curves && mine === asked) fill(body, charts(ctx, curves));
      } catch (error) {
        if (mine === asked) fill(body, h("p", { class: "problem" }, `The curves could not be read: ${error.message}. Press TensorBoard's reload button to try again.`));
      }
    },
  };
}

/** [[watt-hours or grams so far, loss], …] of a run. Both series are thinned by TensorBoard, so the cumulative one is read between its steps. */
function curveOf(ctx, run, found) {
  const { tag, scale } = AXES[ctx.state.cumulative];
  const loss = lossHomes(run).map((home) => found.get(home)[ctx.lossOf(run)]).find(Boolean);
  const used = found.get(run.id)[tag];
  if (!loss || !used?.step.length) return { run, raw: [], points: [] };
  const steps = [];
  const sums = [];
  used.step.forEach((step, k) => {
    if (!f.known(used.value[k])) return;
    while (steps.length && steps.at(-1) >= step) [steps.pop(), sums.pop()]; // a resumed run goes over its steps again
    steps.push(step);
    sums.push(used.value[k] * scale);
  });
  const raw = [];
  let k = 0;
  loss.step.forEach((step, n) => {
    if (!f.known(loss.value[n])) return;
    while (k < steps.length - 1 && steps[k + 1] <= step) k += 1;
    if (k && steps[k] > step) k = 0;
    const next = Math.min(k + 1, steps.length - 1);
    const share = step <= steps[k] ? 0 : steps[next] > steps[k] ? Math.min(1, (step - steps[k]) / (steps[next] - steps[k])) : 0;
    raw.push([sums[k] + share * (sums[next] - sums[k]), loss.value[n]]);
  });
  raw.sort((a, b) => a[0] - b[0]);
  return { run, raw, points: smoothed(raw, ctx.state.smooth) };
}

/** A moving mean with exponential weights, without the pull towards zero at the start. */
function smoothed(points, weight) {
  let mean = 0;
  let mass = 0;
  return points.map(([at, value]) => {
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return [at, mean / mass];
  });
}

function charts(ctx, curves) {
  const points = pointsOf(new Set(ctx.chosen.flatMap(lossHomes)).size);
  const thinned = points < pointsOf(1) ? points : 0;
  const { word, format } = AXES[ctx.state.cumulative];
  const found = curves.filter((curve) => curve.points.length);
  const without = curves.filter((curve) => !curve.points.length);
  if (!found.length) return h("div", { class: "empty" }, h("h2", {}, "Nothing to draw yet"), h("p", {}, `No chosen run has both ${f.short(ctx.usedLosses.join(" or "), 120)} and cumulative ${word}.`));
  const series = found.flatMap(({ run, raw, points }) => [
    ...(ctx.state.smooth > 0 && found.length <= 12 ? [{ name: run.told, color: ctx.color(run), points: raw, faint: true }] : []),
    { name: run.told, color: ctx.color(run), dash: ctx.dash(run), points },
  ]);
  const lowest = found.map(({ points }) => points.reduce((low, [, value]) => Math.min(low, value), Infinity));
  const reachable = Math.max(...lowest);
  const target = ctx.state.target ?? Number(reachable.toPrecision(4));
  const reached = found.map(({ run, points }) => ({ run, at: points.find(([, value]) => value <= target * (1 + 1e-9) + (ctx.state.target === null ? Math.abs(target) * 1e-3 : 0))?.[0] ?? null }));
  const least = Math.min(...reached.map(({ at }) => at ?? Infinity));
  const slider = h("input", { type: "number", class: "number", id: "target", step: "any", "aria-label": "Loss to reach", "data-key": "target", value: target, onchange: (event) => ctx.set({ target: f.known(Number(event.target.value)) && event.target.value !== "" ? Number(event.target.value) : null }) });
  return [
    h("section", { class: "panel" }, h("h2", {}, `Loss against cumulative ${word}`), legend(series.filter((one) => !one.faint).slice(0, 24)),
      lines({ label: `Loss against cumulative ${word}`, series, xFormat: format, yFormat: f.tick, xLabel: `cumulative ${word}`, xFromZero: true, view: ctx.state.zoom, onView: (view) => ctx.set({ zoom: view }), height: 340, marks: [{ y: target }, ...reached.filter(({ at }) => at !== null).map(({ run, at }) => ({ x: at, y: target, color: ctx.color(run) }))] }),
      h("p", { class: "note" }, `${ctx.usedLosses.length > 1 ? "Each run by its own of " : ""}${f.short(ctx.usedLosses.join(", "), 120)}; further down and to the left is better. Energy of the whole run, evaluation and saving included.${thinned ? ` Of so many runs, each curve is drawn by ${thinned} of its points.` : ""}`),
      without.length ? h("p", { class: "note" }, `Without both curves: ${without.slice(0, 8).map(({ run }) => f.short(run.told, 40)).join(", ")}${without.length > 8 ? ` and ${without.length - 8} more` : ""}.`) : null),
    h("section", { class: "panel holds-table", "aria-label": "Cost of a loss" },
      h("div", { class: "bar" }, h("h2", {}, "To reach a loss of"), slider),
      h("div", { class: "scroll" }, h("table", { class: "projection beside" },
        h("thead", {}, h("tr", {}, ["Run", `Cumulative ${word}`, "Against the least"].map((title) => h("th", { scope: "col" }, title)))),
        h("tbody", {}, [...reached].sort((a, b) => (a.at ?? Infinity) - (b.at ?? Infinity)).map(({ run, at }) => h("tr", {},
          h("th", { scope: "row" }, h("i", { class: "swatch", style: { "--c": ctx.color(run) } }), named(run.told, { class: "strong" })),
          h("td", {}, at === null ? "not reached" : format(at)),
          h("td", {}, at === null || !(least > 0) ? f.UNKNOWN : at === least ? "least" : `×${f.digits(at / least)}`)))))),
      h("p", { class: "note" }, "By the smoothed curve; one training each, so without an interval.")),
  ];
}
