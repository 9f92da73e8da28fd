// Asking the server, and a snapshot as the views want it. What a snapshot lacks, or has in another shape, reads null.

import { known, plain, short, tick } from "./format.js";
import { difference, gainRange, meanInterval, pairedDifference, spread, stretches, sum } from "./stats.js";

const SCHEMA = 1;
const MOST_KEPT = 2000; // digests that fit into an address
const STALE_S = 900; // a running run writes a snapshot every 10 minutes or more often
const WARM_UP_STEPS = 3; // left out of differences: caches, clocks and allocators settle
const SAME_BATCH = 0.01; // relative: a last batch that is not full is no other batch size
const SAME_LOSS = 0.02; // relative; as green_torch.compare has it
export const LAST_LOSSES = 0.05; // the share of a loss's points, at its end, whose mean is the final loss
const FEWEST_LOSSES = 3;
const FEW = 12; // runs
const GROUP = 25;
const LONGEST_NAMES = 16_000; // characters
export const UNITS = { token: "tokens", sample: "samples", step: "steps" };

async function ask(path, parameters = [], early = null) {
  const url = new URL(path, import.meta.url);
  for (const [key, value] of parameters) url.searchParams.append(key, value);
  const answer = await (early ?? fetch(url));
  if (!answer.ok) throw new Error(`TensorBoard answered ${answer.status} ${answer.statusText} to ${path}`);
  return answer.json();
}

export const askTags = (runs) => ask("tags", runs.map((run) => ["run", run]));
export const askRegions = () => ask("regions.json");

/** Series by run and tag, of at most so many points, and of those the last share. */
export const askScalars = (runs, tags, points, last = 1) => ask("scalars", [...runs.map((run) => ["run", run]), ...tags.map((tag) => ["tag", tag]), ["points", points], ["last", last]]);

/** So many points of a curve are asked for: each of a few runs as TensorBoard keeps them, of many runs together about as many as a screen shows. */
export const pointsOf = (nRuns) => (nRuns <= FEW ? 2000 : 250);

/** Runs whose curves are asked for at once: few enough to be answered within a moment, with names that fit into an address. */
export function inGroups(runs) {
  const groups = [];
  let length = Infinity;
  for (const run of runs) {
    const own = encodeURIComponent(run).length;
    if (length + own > LONGEST_NAMES || groups.at(-1).length === GROUP) {
      groups.push([]);
      length = 0;
    }
    groups.at(-1).push(run);
    length += own;
  }
  return groups;
}

/** The runs so far; those in `before` whose snapshot is the same are kept as they are. `early`: the answer to this, where it was asked for already. */
export async function askRuns(before, early = null) {
  const have = new Map(before.map((run) => [run.digest, run]));
  const answer = await ask("runs", have.size ? [["have", [...have.keys()].slice(0, MOST_KEPT).join(",")]] : [], early);
  const rows = Array.isArray(answer.runs) ? answer.runs : [];
  const kept = new Map(before.map((run) => [`${run.id}\n${run.digest}`, run]));
  const runs = [];
  for (const row of rows) {
    let run = kept.get(`${row.run}\n${row.digest}`);
    if (!run && !row.snapshot && !row.problem && have.has(row.digest)) run = copied(have.get(row.digest), { id: row.run });
    runs.push(run ?? readRun(row));
  }
  return { nRuns: answer.n_runs ?? runs.length, runs: relabelled(runs) };
}

/** A run of the answer, whatever its snapshot holds. */
function readRun(row) {
  const bare = { id: String(row.run), digest: row.digest, wallS: row.wall_s, label: String(row.run) || ".", problem: row.problem ?? "" };
  if (bare.problem || !row.snapshot) return { ...bare, problem: bare.problem || "it has no snapshot" };
  try {
    return readSnapshot(row.snapshot, { ...bare, comparison: readComparison(row.comparison) });
  } catch (error) {
    return { ...bare, problem: `its snapshot can't be read (${error.message})` };
  }
}

/** What was put off for a cleaner grid; savings are fractions of the baseline, null where they are not known. */
export function readDeferral(told) {
  const one = object(told);
  const saving = (mean, baseline) => (known(mean) && baseline > 0 ? 1 - mean / baseline : null);
  const means = (kind) => [number(one[`${kind}_g_per_kwh`]), number(one[`${kind}_baseline_g_per_kwh`])];
  const [planned, realised] = ["planned", "realised"].map((kind) => ({ means: means(kind), saving: saving(...means(kind)) }));
  const seconds = (from, to) => (known(one[from]) && known(one[to]) ? (one[to] - one[from]) / 1e9 : null);
  const left = seconds("baseline_unix_ns", "deadline_unix_ns");
  return {
    planned,
    realised,
    policy: text(one.policy),
    baseline: text(one.baseline),
    waitedS: seconds("stop_unix_ns", "resume_unix_ns"),
    slackS: left !== null && known(one.work_s) ? left - one.work_s : null,
    workS: number(one.realised_work_s),
    idle: text(one.idle_basis) ? { share: number(one.idle_share), basis: text(one.idle_basis) } : null,
    grid: [one.region, one.method, one.kind, one.source].map(text).filter(Boolean),
    unknown: text(one.unknown),
  };
}

const number = (value) => (known(value) ? value : null);
const text = (value) => (typeof value === "string" ? value : "");
const list = (value) => (Array.isArray(value) ? value : []);
const object = (value) => (value && typeof value === "object" && !Array.isArray(value) ? value : {});

/** Rows under named columns as objects, all made alike. */
function table(columns, rows) {
  const names = list(columns).map(String);
  return list(rows).map((row) => {
    const made = {};
    for (let k = 0; k < names.length; k += 1) made[names[k]] = row?.[k];
    return made;
  });
}

/** Gives an object properties that are worked out together when the first of them is asked for: what nobody looks at costs nothing. */
function later(object, keys, workOut) {
  let found = null;
  const get = (key) => ({ get: () => (found ??= workOut())[key], enumerable: true, configurable: true });
  return Object.defineProperties(object, Object.fromEntries(keys.map((key) => [key, get(key)])));
}

/** The same with some of it changed; what was not worked out yet still is not. */
const copied = (run, changes) => Object.assign(Object.defineProperties({}, Object.getOwnPropertyDescriptors(run)), changes);

/** The blocks that `green_torch.compare` measured of a run, in turn with those of other runs; null where it is none of its runs. */
export function readComparison(told) {
  const blocks = list(told?.blocks).map(object).filter((block) => known(block.round) && known(block.position) && block.duration_s > 0);
  if (!blocks.length || !text(told.id)) return null;
  return {
    id: told.id,
    confidence: number(told.confidence) ?? 0.95,
    looking: Boolean(told.looking),
    tolerance: number(told.loss_tolerance) ?? SAME_LOSS,
    ran: text(told.ran),
    settings: text(told.settings),
    builtIn: Boolean(told.built_in),
    blocks,
  };
}

function readSnapshot(snapshot, bare) {
  if (number(snapshot.schema) > SCHEMA) {
    return { ...bare, problem: `its snapshot is of version ${snapshot.schema}, newer than this page: pip install --upgrade green-torch` };
  }
  const manifest = object(snapshot.manifest);
  const summary = object(snapshot.summary);
  const totals = object(snapshot.totals);
  const energies = new Map(list(totals.domains).map((one) => [one?.name, object(one)]));
  const run = {
    ...bare,
    manifest,
    label: text(manifest.label) || text(manifest.run_name) || bare.id || ".",
    name: text(manifest.run_name),
    runId: text(manifest.run_id),
    status: text(snapshot.status) || "running",
    device: text(manifest.device),
    model: text(manifest.model),
    parameters: number(manifest.parameters),
    worldSize: number(manifest.world_size) ?? 1,
    startedS: number(manifest.started_unix_ns) === null ? null : manifest.started_unix_ns / 1e9,
    originS: number(snapshot.origin_unix_s),
    domains: list(manifest.domains).map(object).map((domain) => ({
      name: text(domain.name),
      sensor: text(domain.uuid) || `${text(domain.name)} of ${text(object(manifest.job).node) || bare.id}`, // as recorded.py knows it
      method: text(domain.method),
      device: text(domain.device),
      source: text(domain.source),
      gainError: number(domain.gain_error),
      shared: Boolean(domain.shared),
      energyJ: number(energies.get(domain.name)?.energy_j),
    })),
    missing: list(manifest.missing).map(text),
    grid: manifest.intensity ? object(manifest.intensity) : null,
    pue: number(manifest.pue),
    pueSource: text(manifest.pue_source),
    price: number(manifest.price_per_kwh),
    peaks: list(manifest.peaks).map(object),
    plannedSteps: number(manifest.planned_steps),
    carriedJ: number(manifest.carried_energy_j),
    carriedG: number(manifest.carried_emissions_g),
    resumedFrom: number(manifest.resumed_from_step),
    deferrals: list(manifest.deferrals).map(readDeferral),
    flags: object(snapshot.flags),
    warnings: list(summary.warnings).map(text),
    lastStep: number(snapshot.last_step),
    excludedSteps: number(object(snapshot.excluded).n_steps) ?? 0,
    peakMemory: number(summary.peak_memory_bytes) ?? number(snapshot.peak_memory_bytes),
    phases: list(snapshot.phases).map(object),
    spans: table(snapshot.span_columns, snapshot.spans),
    nSpans: number(snapshot.n_spans) ?? 0,
    totals,
  };
  const job = snapshot.job ?? summary.job;
  run.job = job && typeof job === "object" ? job : null;
  return later(run, FIGURES, () => figures(run, table(snapshot.columns, snapshot.blocks), summary));
}

/** A mean, and the rates of stretches of the run that its scatter is judged by, or null. */
class Rate {
  #workOut;
  #series;
  #spread;

  constructor(value, workOut) {
    this.value = value;
    this.#workOut = workOut;
  }

  get series() {
    if (this.#series === undefined) this.#series = this.#workOut();
    return this.#series;
  }

  /** [low, high] as factors of the mean, or null. */
  get spread() {
    if (this.#spread === undefined) this.#spread = this.series && spread(this.series);
    return this.#spread;
  }
}

/** What a run's rates are made of: the quantity, and the blocks that know it. */
const QUANTITIES = { energy: "energy_j", time: "duration_s", emissions: "emissions_g" };
const WORK = { token: "tokens", sample: "samples", step: "n_steps" };

const FIGURES = ["unit", "energy", "time", "emissions", "steps", "perStep", "power", "mfu", "hfu", "modelFlopPerS", "peakFlopPerS", "totalJ", "totalG", "bounds"];

/** The means over typical train steps, each over the blocks that know both sides of it. */
function figures(run, blocks, summary) {
  const { job } = run;
  const metered = blocks.filter((block) => known(block.energy_j) && !block.unmetered_steps);
  const counted = blocks.filter((block) => !block.uncounted_steps);
  const ratio = (chosen, top, bottom) => {
    const both = chosen.filter((block) => known(block[top]) && known(block[bottom]));
    const [a, b] = [sum(both.map((block) => block[top])), sum(both.map((block) => block[bottom]))];
    return both.length && b > 0 ? a / b : null;
  };
  const train = object(run.phases.find((phase) => phase.phase === "train"));
  // rank zero speaks for all ranks: what they used and did over what it did
  const over = (all, own) => (known(all) && own > 0 ? all / own : 1);
  const scale = { energy: over(job?.energy_j, run.totals.energy_j), token: over(job?.tokens, train.tokens), sample: over(job?.samples, train.samples), step: 1 };
  const rates = (quantity) => {
    const chosen = quantity === "time" ? blocks : metered;
    const more = quantity === "time" ? 1 : scale.energy;
    return Object.fromEntries(Object.entries(WORK).map(([unit, work]) => {
      const own = ofBlocks(run.comparison, QUANTITIES[quantity], work);
      if (own) return [unit, own];
      const value = ratio(chosen, QUANTITIES[quantity], work);
      return [unit, value === null ? null : new Rate((value * more) / scale[unit], () => series(chosen, QUANTITIES[quantity], work))];
    }));
  };
  const [energy, time, emissions] = ["energy", "time", "emissions"].map(rates);
  const steps = blocks.reduce((total, block) => total + (block.n_steps || 0), 0);
  const perStep = (unit) => (ratio(blocks, WORK[unit], "n_steps") ?? 0) * scale[unit];
  const hardware = counted.every((block) => known(block.hardware_flops)) ? ratio(counted, "hardware_flops", "capacity_flops") : null;
  const typical = (top, bottom) => ofBlocks(run.comparison, top, bottom)?.value ?? null; // of a comparison: as the command has it
  const power = typical("energy_j", "duration_s") ?? ratio(metered, "energy_j", "duration_s");
  return {
    unit: time.token ? "token" : time.sample ? "sample" : "step",
    energy,
    time,
    emissions,
    steps,
    perStep: { token: perStep("token"), sample: perStep("sample"), step: 1 },
    power: power === null ? null : power * scale.energy,
    mfu: number(job?.mfu) ?? typical("model_flops", "capacity_flops") ?? ratio(counted, "model_flops", "capacity_flops") ?? number(summary.mfu),
    hfu: number(job?.hfu) ?? typical("hardware_flops", "capacity_flops") ?? hardware ?? number(summary.hfu),
    modelFlopPerS: times(typical("model_flops", "duration_s") ?? ratio(counted, "model_flops", "duration_s") ?? number(summary.model_flop_per_s), over(job?.model_flops, train.model_flops)),
    peakFlopPerS: number(job?.peak_flop_per_s) ?? number(summary.peak_flop_per_s) ?? ratio(counted, "capacity_flops", "duration_s"),
    totalJ: job ? plus(number(job.energy_j), number(job.carried_energy_j)) : plus(number(run.totals.energy_j), run.carriedJ),
    totalG: job ? plus(number(job.emissions_g), number(job.carried_emissions_g)) : plus(number(run.totals.emissions_g), run.carriedG),
    bounds: boundsOf(run, summary),
  };
}

const times = (a, b) => (a === null ? null : a * b);

/** The rate of a comparison's blocks, sums over sums as the command has it; null where one is not known. */
function ofBlocks(comparison, top, bottom) {
  const rates = comparison?.blocks.map((block) => block[top] / block[bottom]) ?? [];
  return rates.length && rates.every((rate) => rate > 0 && Number.isFinite(rate)) ? new Rate(sum(comparison.blocks.map((block) => block[top])) / sum(comparison.blocks.map((block) => block[bottom])), () => rates) : null;
}

/** The rates of stretches of the run past its first steps, in order of time; null where one is not above zero. */
function series(blocks, top, bottom) {
  if (!blocks.length) return null;
  const first = blocks[0].first_step - (blocks[0].excluded_steps || 0);
  const warm = blocks.filter((block) => block.first_step - first >= WARM_UP_STEPS && known(block[top]) && known(block[bottom]));
  const rates = stretches(warm).map((group) => sum(group.map((block) => block[top])) / sum(group.map((block) => block[bottom])));
  return rates.length && rates.every((rate) => rate > 0 && Number.isFinite(rate)) ? rates : null;
}

const plus = (a, b) => (a === null ? b : b === null ? a : a + b);

/** [lowest, highest] of the run's joules over their estimate, from the meter's bounds as one interval; null where there are none. */
function boundsOf(run, summary) {
  const [lo, hi, at] = [summary.energy_per_step_lo_j, summary.energy_per_step_hi_j, summary.energy_per_step_j];
  if (known(lo) && known(hi) && at > 0) return [lo / at, hi / at];
  const train = run.phases.find((phase) => phase.phase === "train");
  if (train && known(train.energy_lo_j) && known(train.energy_hi_j) && train.energy_j > 0) {
    return [train.energy_lo_j / train.energy_j, train.energy_hi_j / train.energy_j];
  }
  return null;
}

/** Runs of the same label are told apart by TensorBoard's name of them. */
function relabelled(runs) {
  const uses = new Map();
  for (const run of runs) uses.set(run.label, (uses.get(run.label) ?? 0) + 1);
  return runs.map((run, index) => Object.assign(run, {
    index,
    told: uses.get(run.label) > 1 && run.label !== run.id ? `${short(run.label, 40)} · ${run.id || "."}` : run.label,
  }));
}

/** completed, failed, running; "silent" for a running one that nobody has heard of for long. */
export function statusOf(run) {
  if (run.status !== "running") return run.status;
  return known(run.wallS) && Date.now() / 1000 - run.wallS > STALE_S ? "silent" : "running";
}

/** "counter", "sampled", "estimated", "mixed", or "" where nothing is metered. */
export function methodOf(run) {
  const methods = new Set(run.domains.map((domain) => domain.method));
  return methods.size > 1 ? "mixed" : methods.size ? [...methods][0] : "";
}

export const isModelled = (run) => run.domains.length > 0 && run.domains.every((domain) => domain.method === "estimated");

/** The unit of work that all of these runs count. */
export function commonUnit(runs) {
  return ["token", "sample", "step"].find((unit) => runs.every((run) => run.time[unit])) ?? "step";
}

/** The rate's interval, by the scatter between stretches; for joules widened by the meter's bounds. */
export function interval(run, quantity, unit) {
  const found = run[quantity][unit];
  if (!found) return null;
  const scatter = found.spread;
  const bounds = quantity === "time" ? null : run.bounds;
  if (!scatter && !bounds) return null;
  const [lo, hi] = scatter ?? [1, 1];
  return [found.value * lo * Math.min(1, bounds?.[0] ?? 1), found.value * hi * Math.max(1, bounds?.[1] ?? 1)];
}

const peakName = (run) => run.peaks.map((peak) => `${peak.device} ${peak.dtype} ${peak.flop_per_s}`).sort().join("; ");
export const samePeaks = (runs) => new Set(runs.map(peakName)).size <= 1;
const unnumbered = (name) => name.replace(/\d+$/, "");
const meteredAs = (run) => run.domains.map((domain) => `${unnumbered(domain.name)} by ${domain.method}`).sort().join(", ");
const devices = (run) => run.domains.map((domain) => domain.device).sort().join(", ");
const gridName = (grid) => (grid ? `${grid.region} (${grid.basis}, ${grid.average === false ? "marginal" : "average"})` : "an intensity provider");

/**
 * Why a run can't be compared with the baseline. `firm`: nothing to compare; `soft`: it can be asked for all the same; `carbon`: grams
 * alone. The same questions as `green-torch compare runs/a runs/b` asks.
 */
export function obstacles(base, run) {
  const together = pairs(base, run).length > 0; // the same model on the same machine; what differs is what was compared
  let firm = "";
  if (together) firm = "";
  else if (base.unit !== run.unit) firm = `its work is counted in ${UNITS[run.unit]}, the baseline's in ${UNITS[base.unit]}`;
  else if (!run.time[run.unit]?.series || !base.time[base.unit]?.series) firm = "too few typical steps were measured yet";
  const unit = WORK[run.unit];
  const soft = together ? [] : [
    ["the model is", base.model, run.model],
    ["parameters are", base.parameters?.toLocaleString("en-US"), run.parameters?.toLocaleString("en-US")],
    ["the device is", base.device, run.device],
    ["metered are", devices(base), devices(run)],
    ["joules are known of", meteredAs(base), meteredAs(run)],
    ["processes are", base.worldSize, run.worldSize],
  ].filter(([, own, theirs]) => own && theirs && own !== theirs).map(([what, own, theirs]) => `${what} ${short(theirs, 60)} against ${short(own, 60)}`);
  const [own, theirs] = [base.perStep[run.unit], run.perStep[run.unit]];
  if (!together && run.unit !== "step" && own && theirs && Math.abs(theirs / own - 1) > SAME_BATCH) soft.push(`the batch is ${tick(theirs)} ${unit} a step against ${tick(own)}`);
  let carbon = "";
  if (gridName(base.grid) !== gridName(run.grid) || base.grid?.g_per_kwh !== run.grid?.g_per_kwh) carbon = `the grid is ${short(gridName(run.grid), 60)} against ${short(gridName(base.grid), 60)}: Savings puts both on one`;
  else if (base.pue !== run.pue) carbon = `PUE is ${run.pue} against ${base.pue}: Savings puts both on one`;
  return { firm, soft: [...new Set(soft)], carbon };
}

/** What matters to how a comparison is read. */
export function cautions(base, run, force) {
  const found = [];
  const { soft } = obstacles(base, run);
  if (force && soft.length) found.push(`compared all the same: ${soft.join("; ")}`);
  if ([base, run].some((one) => one.domains.some((domain) => domain.shared))) found.push("the meter was shared with other processes");
  return found;
}

const differences = new WeakMap(); // by run, then by baseline, then by what was asked: they are asked for again at every redraw

/** The difference of "energy" or "time" per unit of work against the baseline, one of `nCompared`: {refused} or a difference. */
export function against(base, run, quantity, { nCompared = 1, force = false } = {}) {
  const of = (map, key, made) => map.get(key) ?? (map.set(key, made), made);
  const kept = of(of(differences, run, new WeakMap()), base, new Map());
  const asked = `${quantity} ${nCompared} ${force}`;
  return kept.get(asked) ?? of(kept, asked, differenceOf(base, run, quantity, nCompared, force));
}

function differenceOf(base, run, quantity, nCompared, force) {
  const { firm, soft } = obstacles(base, run);
  if (firm || (soft.length && !force)) return { refused: firm || soft.join("; ") };
  const together = pairs(base, run);
  if (together.length) return paired(base, run, together, quantity, nCompared);
  const [a, b] = [base[quantity][run.unit], run[quantity][run.unit]];
  if (!a?.series || !b?.series) return { refused: quantity === "energy" ? "energy was not measured in both" : "not known in both" };
  const found = difference(a.series, b.series, quantity === "time" ? { nCompared } : { nCompared, instrument: instrument(base, run), gain: gains(base, run) });
  return found;
}

/** The blocks of the rounds that two runs of one comparison both have, [base's, run's]; none where they are of different ones. */
function pairs(base, run) {
  const [a, b] = [base.comparison, run.comparison];
  if (!a || !b || a.id !== b.id) return [];
  const byRound = new Map(b.blocks.map((block) => [block.round, block]));
  return a.blocks.filter((block) => byRound.has(block.round)).map((block) => [block, byRound.get(block.round)]);
}

export const isPaired = (base, run) => base !== run && pairs(base, run).length > 0;

/** The difference by pairs of blocks: the same as Comparison.time and .energy of green_torch/experiment/results.py. */
function paired(base, run, rounds, quantity, nCompared) {
  const [top, unit] = [QUANTITIES[quantity], Object.values(WORK).find((work) => rounds.every((pair) => pair.every((block) => block[work])))];
  const together = rounds.filter((pair) => pair.every((block) => known(block[top]))); // a meter may have failed in some
  const rates = (name) => [0, 1].map((side) => together.map((pair) => (known(pair[side][name]) ? pair[side][name] / pair[side][unit] : NaN)));
  const [a, b] = rates(top);
  if (!together.length || ![...a, ...b].every((rate) => rate > 0)) return { refused: quantity === "energy" ? "energy was not measured in both" : "not known in both" };
  const { confidence, looking } = base.comparison;
  const settings = { gaps: together.map(([x, y]) => y.position - x.position), confidence, looking, nCompared };
  if (quantity === "energy") {
    const [lows, highs] = [rates("energy_lo_j"), rates("energy_hi_j")];
    if ([...lows, ...highs].flat().every(known)) settings.bounds = lows.map((side, k) => side.map((low, n) => [low, highs[k][n]]));
    settings.gain = gainOf(base, together);
  }
  const found = pairedDifference(a, b, settings);
  if (found.distinguishable && sameKernels(base.comparison, run.comparison)) {
    return { ...found, distinguishable: false, note: "can't be told apart: both ran the same kernels" };
  }
  return found;
}

const sameKernels = (a, b) => Boolean(a.ran) && a.ran === b.ran && (a.settings !== b.settings || (a.builtIn && b.builtIn));

/** How far the sensors' gain errors may shift the ratio of the blocks' joules. */
function gainOf(base, together) {
  const names = [...new Set(together.flat().flatMap((block) => Object.keys(object(block.domains_j))))];
  const of = (side, name) => sum(together.map((pair) => object(pair[side].domains_j)[name] ?? 0));
  return gainRange(names.map((name) => [of(0, name), of(1, name), base.domains.find((domain) => domain.name === name)?.gainError ?? null]));
}

/**
 * Why a run is not the same training as the baseline, as far as the losses tell; empty where it is. Of one comparison by its blocks (both
 * saw the same batches; the means over the later half, as Comparison.departure), else by the final losses of both ({mean, lo, hi, tag}): these must be
 * further apart than their scatter, too.
 */
export function departure(base, run, loss = null) {
  const together = pairs(base, run);
  const percent = (tolerance) => `more than ${Number((100 * tolerance).toPrecision(2))} % apart`;
  const apart = (a, b, tolerance) => known(a) && known(b) && Math.abs(b - a) > tolerance * Math.abs(a);
  const told = (a, b, tolerance, tags = "") => `not the same training: loss ${plain(b)} against ${plain(a)}, ${percent(tolerance)}${tags}`;
  if (!together.length) {
    const [own, theirs] = [loss?.base, loss?.run];
    if (!own || !theirs || !apart(own.mean, theirs.mean, SAME_LOSS)) return "";
    const overlap = known(own.lo) && known(theirs.lo) && own.lo <= theirs.hi && theirs.lo <= own.hi;
    const tags = own.tag === theirs.tag ? "" : `, by ${short(theirs.tag, 60)} and ${short(own.tag, 60)}`;
    return overlap ? "" : told(own.mean, theirs.mean, SAME_LOSS, tags);
  }
  const last = together.at(-1);
  if (last[0].tokens !== last[1].tokens || last[0].samples !== last[1].samples) return "not the same training: the batch size differs";
  const whose = ["the baseline's loss", "the loss"].find((_, side) => together.some((pair) => pair[side].diverged));
  if (whose) return `not the same training: ${whose} is not finite`;
  const { tolerance } = base.comparison;
  const both = together.slice(Math.floor(together.length / 2)).filter((pair) => pair.every((block) => known(block.loss)));
  const [own, theirs] = [0, 1].map((side) => (both.length ? sum(both.map((pair) => pair[side].loss)) / both.length : null));
  return apart(own, theirs, tolerance) ? told(own, theirs, tolerance) : "";
}

/** The departure of a run from the baseline on the page, by what is known there of their losses. */
export const departureOf = ({ base, losses }, run) => departure(base, run, { base: losses.get(base.id), run: losses.get(run.id) });

/** The relative difference that the meters' bounds allow. */
function instrument(base, run) {
  if (!base.bounds || !run.bounds) return null;
  const ratioOf = run.energy[run.unit].value / base.energy[base.unit].value;
  return [(ratioOf * run.bounds[0]) / base.bounds[1] - 1, (ratioOf * run.bounds[1]) / base.bounds[0] - 1];
}

/** How far the sensors' gain errors may shift the ratio: of one and the same sensor the error cancels, of two each may be off by its own. */
function gains(base, run) {
  const [errors, joules] = [new Map(), [new Map(), new Map()]];
  [base, run].forEach((one, side) => one.domains.forEach(({ sensor, energyJ, gainError }) => {
    joules[side].set(sensor, (joules[side].get(sensor) ?? 0) + (energyJ ?? NaN));
    if (known(gainError)) errors.set(sensor, Math.max(gainError, errors.get(sensor) ?? 0));
  }));
  const sensors = [...new Set(joules.flatMap((side) => [...side.keys()]))];
  return gainRange(sensors.map((sensor) => [...joules.map((side) => side.get(sensor) ?? 0), errors.get(sensor) ?? null]));
}

/** TensorBoard runs that may hold this run's loss: its own, and the one above where ours had to be the sub-run "green". */
export function lossHomes(run) {
  if (run.id === "green") return ["green", "."];
  return run.id.endsWith("/green") ? [run.id, run.id.slice(0, -"/green".length)] : [run.id];
}

/** Of these tags the one that is most likely the training loss; "" where none says so. */
export function likelyLoss(tags) {
  const asked = ["train_loss", "train/loss", "loss", "loss/train", "training_loss", "Loss/train", "train_loss_step"];
  const found = asked.find((tag) => tags.includes(tag));
  if (found) return found;
  const alike = tags.filter((tag) => /loss/i.test(tag) && !/^green/.test(tag));
  return alike.sort((a, b) => /val|test|eval/i.test(a) - /val|test|eval/i.test(b) || a.length - b.length)[0] ?? "";
}

/** The tags of curves to choose a loss from, those named like one first. */
export const lossesFirst = (tags) => [...tags].sort((a, b) => /loss/i.test(b) - /loss/i.test(a) || (a < b ? -1 : 1));

/**
 * A run's final loss: the mean of its last points with its interval, of how many it is, and the step of the first; null where there is none.
 * Fewer than three points have no interval: that of two is nine times their spread.
 */
export function finalLoss(series) {
  const values = series?.value.filter(known) ?? [];
  const found = meanInterval(values);
  const unknown = values.length < FEWEST_LOSSES ? { lo: null, hi: null } : {};
  return values.length ? { ...found, ...unknown, from: series.step[0] } : null;
}
