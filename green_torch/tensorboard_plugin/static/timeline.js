// Timeline: power by domain with its bounds, grid intensity, phases; by step or by time.

import { lines, ticks, timeTicks } from "./charts.js";
import { fill, h, named } from "./dom.js";
import * as f from "./format.js";

const SLACK_S = 0.25; // by which a record may seem to have begun late
const SHADE = { eval: "evaluation", save: "saving", setup: "setup", paused: "paused", other: "other" };

export function mount(root) {
  let latest = null;
  const runPick = h("select", { id: "focus", "data-key": "focus", onchange: (event) => latest.set({ focus: event.target.value, zoom: null }) });
  const axis = (value, word) => h("button", { type: "button", class: "segment", "data-key": `axis ${value}`, onclick: () => latest.set({ x: value, zoom: null }) }, word);
  const byTime = axis("time", "by time");
  const byStep = axis("step", "by step");
  const all = h("button", { type: "button", class: "quiet", "data-key": "show all", onclick: () => latest.set({ zoom: null }) }, "Show all");
  const body = h("div", { class: "stack" });
  root.append(
    h("div", { class: "bar tools" }, h("label", { for: "focus" }, "Run"), runPick, h("span", { class: "segments", role: "group", "aria-label": "Horizontal axis" }, byTime, byStep), h("span", { class: "grow" }), all),
    body,
  );
  let asked = 0;
  return {
    async update(ctx) {
      latest = ctx;
      const run = ctx.chosen.find((one) => one.id === ctx.state.focus) ?? ctx.base;
      runPick.replaceChildren(...ctx.chosen.map((one) => h("option", { value: one.id, selected: one === run }, f.short(one.told, 60))));
      runPick.value = run.id;
      byTime.setAttribute("aria-pressed", String(ctx.state.x === "time"));
      byStep.setAttribute("aria-pressed", String(ctx.state.x === "step"));
      all.disabled = !ctx.state.zoom;
      asked += 1;
      const mine = asked;
      if (!body.childElementCount) fill(body, h("p", { class: "loading" }, "Reading the run's curves…"));
      try {
        const series = (await ctx.scalars([run.id], tagsOf(run))).get(run.id);
        if (mine === asked) fill(body, charts(ctx, run, series));
      } catch (error) {
        if (mine === asked) fill(body, h("p", { class: "problem" }, `The curves could not be read: ${error.message}. Press TensorBoard's reload button to try again.`));
      }
    },
  };
}

const clean = (name) => name.replace(/[^-.0-9A-Z_a-z]/g, "_").slice(0, 64);
const powerTags = (domain) => ["power", "power_lo", "power_hi"].map((kind) => `green_detail/${kind}_${clean(domain.name)}_W`);
const TOTAL = "green/power_W";
const STEP_TIME = "green/step_time_s";
const GRID = "green/intensity_gCO2e_per_kWh";
const tagsOf = (run) => [TOTAL, GRID, STEP_TIME, ...run.domains.slice(0, 16).flatMap(powerTags)];

/** Points of a tag on the axis asked for: steps, or seconds since the run began. */
function pointsOf(series, tag, x, origin) {
  const found = series[tag];
  if (!found) return [];
  return found.step.map((step, k) => [x === "step" ? step : found.wall_s[k] - origin, found.value[k]]).filter(([at, value]) => f.known(at) && f.known(value));
}

/** When the record that ends at each point began, by what its steps took: before that, the run may have been suspended. */
function beginnings(series, origin) {
  const found = series[STEP_TIME];
  const begins = new Map();
  found?.step.forEach((step, k) => {
    if (k && f.known(found.value[k])) begins.set(found.wall_s[k] - origin, found.wall_s[k] - origin - (step - found.step[k - 1]) * found.value[k]);
  });
  return begins;
}

/** The same with a gap wherever another phase was, or nothing: nobody drew that power by training. */
function broken(points, shades, begins, x) {
  if (x === "step") return points;
  const found = [];
  let next = 0;
  for (const point of points) {
    while (next < shades.length && shades[next].to <= point[0] - 1e-9) {
      if (found.length && found.at(-1)[0] < shades[next].to) found.push([shades[next].from, NaN, NaN]);
      next += 1;
    }
    const begin = begins.get(point[0]);
    if (found.length && begin - found.at(-1)[0] > Math.max(SLACK_S, (point[0] - begin) / 2)) {
      found.push([begin, NaN, NaN], [begin, ...point.slice(1)]);
    }
    found.push(point);
  }
  return found;
}

function charts(ctx, run, series) {
  const { x, zoom } = ctx.state;
  const origin = run.originS ?? series[TOTAL]?.wall_s[0] ?? run.startedS ?? 0;
  const points = (tag) => pointsOf(series, tag, x, origin);
  const shades = run.spans.filter((span) => f.known(span.start_s) && f.known(span.end_s)).map((span) => ({
    from: x === "step" ? span.step : span.start_s,
    to: x === "step" ? span.step : span.end_s,
    kind: SHADE[span.phase] ? span.phase : "other",
    word: SHADE[span.phase] ?? "other",
    name: `${SHADE[span.phase] ?? span.phase}: ${f.duration(span.end_s - span.start_s)}, ${f.wattHours(span.energy_j)}`,
  }));
  const begins = beginnings(series, origin);
  const gapped = (found) => broken(found, shades, begins, x);
  const domains = run.domains.map((domain, k) => {
    const [tag, low, high] = powerTags(domain);
    const [lows, highs] = [new Map(points(low)), new Map(points(high))];
    return {
      name: `${domain.name} (${domain.method})`,
      color: `var(--run-${k % 8})`,
      dash: domain.method === "estimated" ? "5 3" : null,
      points: gapped(points(tag)),
      band: gapped([...lows].filter(([at]) => highs.has(at)).map(([at, lo]) => [at, lo, highs.get(at)])),
    };
  }).filter((one) => one.points.length);
  const total = gapped(points(TOTAL));
  const drawn = domains.length > 1 || (run.job && domains.length) ? [{ name: run.job ? "all ranks together" : "all together", color: "var(--text)", points: total }, ...domains] : domains.length ? domains : [{ name: "all together", color: ctx.color(run), points: total }];
  const grid = points(GRID);
  if (!drawn.some((one) => one.points.length)) {
    return h("div", { class: "empty" }, h("h2", {}, "No power curve yet"), h("p", {}, run.domains.length ? "The run has logged no typical step so far; the curve appears with the first." : "Nothing measures energy on this machine: green-torch doctor tells what would."));
  }
  const xFormat = x === "step" ? (value) => f.integer(value) : f.clock;
  const common = { shades, xFormat, xFromZero: x !== "step", xTicks: x === "step" ? ticks : timeTicks, xLabel: x === "step" ? "step" : "", view: zoom, onView: (view) => ctx.set({ zoom: view }) };
  const kinds = [...new Set(shades.map((shade) => shade.kind))];
  return [
    h("section", { class: "panel" }, h("h2", {}, "Power: ", named(run.told)), legend(drawn, [...kinds.map((kind) => h("span", {}, h("i", { class: `shade-key ${kind}` }), SHADE[kind])), run.nSpans > run.spans.length ? h("span", {}, `${run.spans.length} of ${f.integer(run.nSpans)} shown`) : null]),
      lines({ ...common, label: "Power", series: drawn, yFormat: (value) => f.si(value, "W"), fromZero: true, height: 300 }),
      h("p", { class: "note" }, domains.some((one) => one.band.length) ? "Band: where the power of each record lies by the counter's update times (0 ≤ P ≤ 1.5 × the limit). Dashed: modelled." : "No band: these joules are sampled or modelled, so nothing bounds them. Dashed: modelled.", drawn.some((one) => one.points.some(([, value]) => Number.isNaN(value))) ? " Gaps: other phases, and while the run was suspended." : "", run.job ? " Lines by device and phases are rank zero's." : "")),
    grid.length ? h("section", { class: "panel" }, h("h2", {}, "Grid intensity"), lines({ ...common, label: "Grid intensity", series: [{ name: run.grid?.region ?? "grid", color: "var(--muted)", points: grid }], yFormat: (value) => `${f.tick(value)} g`, fromZero: true, height: 150 }),
      h("p", { class: "note" }, `gCO2e/kWh${run.grid ? `, ${f.short(run.grid.region, 60)}, ${run.grid.basis === "unknown" ? "basis not known" : run.grid.basis}; ${f.short(run.grid.source ?? "", 120)}` : ", by the run's intensity provider"}`)) : null,
  ];
}

export const legend = (series, more = []) => h("p", { class: "legend" }, series.map((one) => h("span", {}, h("i", { class: one.dash ? "key dashed" : "key", style: { "--c": one.color } }), h("bdi", {}, f.short(one.name, 40)))), more);
