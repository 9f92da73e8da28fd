// Intervals from the blocks of a run: the formulas of green_torch/statistics.py, with a test that both agree to 1e-9.

const CONFIDENCE = 0.95;
const FEWEST_EFFECTIVE = 2;
const MIN_DRIFT = 6; // pairs; a slope costs a degree of freedom: with fewer it costs more than the drift that it removes
const LOOKING_COSTS = 0.25; // of the error rate, for each e-fold of pairs since the first look
const FIRST_LOOK = 10; // pairs
const FEWEST_CORRELATED = 8; // values; with fewer, a lag-1 autocorrelation is noise
const PAIRS_IN_FULL = 10; // from here on what is not known of it is allowed for in full
const UNCERTAIN = 2; // over n: what is added to a lag-1 autocorrelation since it is not known better
const ONE_SIDED_5_PERCENT = 1.645;
const MIN_CORRELATION = -0.3; // neighbours that are less alike than chance narrow an interval no further
const MAX_CORRELATION = 0.95;
const PRECISION = 1e-14;

/** A sum that loses no small addend to a large one (Neumaier 1974). */
export function sum(values) {
  let total = 0;
  let lost = 0;
  for (const value of values) {
    const next = total + value;
    lost += Math.abs(total) >= Math.abs(value) ? total - next + value : value - next + total;
    total = next;
  }
  return total + lost;
}

/** ln Γ(x), x > 0: Stirling's series (DLMF 5.11.1), with the recurrence below 15. */
function logGamma(x) {
  let below = 1;
  let z = x;
  while (z < 15) {
    below *= z;
    z += 1;
  }
  const w = 1 / (z * z);
  const series = (1 / 12 - w * (1 / 360 - w * (1 / 1260 - w * (1 / 1680 - w * (1 / 1188 - (w * 691) / 360360))))) / z;
  return (z - 0.5) * Math.log(z) - z + 0.5 * Math.log(2 * Math.PI) + series - Math.log(below);
}

/** I_x(a, b) by its continued fraction (DLMF 8.17.22), on the side where that converges fast. */
function incompleteBeta(a, b, x, oneMinusX) {
  if (x <= 0 || oneMinusX <= 0) return oneMinusX <= 0 ? 1 : 0;
  if (x > (a + 1) / (a + b + 2)) return 1 - incompleteBeta(b, a, oneMinusX, x);
  const logarithm = a * Math.log(x) + b * Math.log(oneMinusX) + logGamma(a + b) - logGamma(a) - logGamma(b);
  let c = 1;
  let d = 1 / (1 - ((a + b) * x) / (a + 1));
  let fraction = d;
  for (let m = 1; m < 500; m += 1) {
    const even = (m * (b - m) * x) / ((a + 2 * m - 1) * (a + 2 * m));
    const odd = (-(a + m) * (a + b + m) * x) / ((a + 2 * m) * (a + 2 * m + 1));
    for (const term of [even, odd]) {
      c = 1 + term / c;
      d = 1 / (1 + term * d);
      fraction *= c * d;
    }
    if (Math.abs(c * d - 1) < PRECISION / 10) break;
  }
  return (Math.exp(logarithm) * fraction) / a;
}

const quantiles = new Map();

/** Quantile of Student's t, its degrees of freedom not necessarily whole. */
export function tQuantile(probability, dof) {
  if (probability <= 0.5) return probability < 0.5 ? -tQuantile(1 - probability, dof) : 0;
  const key = `${probability} ${dof}`;
  if (!quantiles.has(key)) {
    const tail = (t) => incompleteBeta(dof / 2, 0.5, dof / (dof + t * t), (t * t) / (dof + t * t)) / 2;
    let low = 0;
    let high = 1;
    while (tail(high) > 1 - probability) [low, high] = [high, 2 * high];
    while (high - low > PRECISION * high) {
      const middle = (low + high) / 2;
      if (middle === low || middle === high) break;
      if (tail(middle) > 1 - probability) low = middle;
      else high = middle;
    }
    quantiles.set(key, (low + high) / 2);
  }
  return quantiles.get(key);
}

/** What is added to the lag-1 autocorrelation of `n` residuals, since it is not known better. */
const uncertain = (n) => (n < FEWEST_CORRELATED ? 0 : (UNCERTAIN / n) * Math.min(1, (n - 4) / (PAIRS_IN_FULL - 4)));

/** By how much likeness of neighbours raises the variance of the mean, and as how many independent values it lets them count. */
function alike(residuals) {
  const n = residuals.length;
  const power = sum(residuals.map((r) => r * r));
  if (n < FEWEST_CORRELATED || !power) return [1, n];
  const raw = sum(residuals.slice(1).map((r, k) => r * residuals[k])) / power;
  const correlation = Math.min(Math.max(raw + (1 + 3 * raw) / n + uncertain(n), MIN_CORRELATION), MAX_CORRELATION);
  const inflation = Math.min((1 + correlation) / (1 - correlation), n / FEWEST_EFFECTIVE);
  return [inflation, raw + 1 / n > ONE_SIDED_5_PERCENT / Math.sqrt(n) ? n / inflation : n];
}

const flat = (values) => {
  const mean = sum(values) / values.length;
  return { mean, residuals: values.map((value) => value - mean), leverage: 1 / values.length, fitted: 1 };
};

/** Least squares with a slope, seen at x = 0; null where zero lies outside the x. */
function line(xs, ys) {
  if (!(Math.min(...xs) < 0 && Math.max(...xs) > 0)) return null;
  const n = xs.length;
  const [xMean, yMean] = [sum(xs) / n, sum(ys) / n];
  const xSpread = sum(xs.map((x) => (x - xMean) ** 2));
  const slope = sum(xs.map((x, k) => (x - xMean) * (ys[k] - yMean))) / xSpread;
  const mean = yMean - slope * xMean;
  return { mean, residuals: ys.map((y, k) => y - mean - slope * xs[k]), leverage: 1 / n + xMean ** 2 / xSpread, fitted: 2 };
}

/** Mean, its standard error and degrees of freedom, of values in order of time; fewer than two have no error. */
export function meanError(values, covariate = null) {
  const n = values.length;
  const { mean, residuals, leverage, fitted } = (covariate && n >= MIN_DRIFT && line(covariate, values)) || flat(values);
  if (n < 2) return { mean, error: null, dof: null, n, nEffective: null };
  const [inflation, nEffective] = alike(residuals);
  const variance = sum(residuals.map((x) => x * x)) / (n - fitted);
  return { mean, error: Math.sqrt(variance * leverage * inflation), dof: Math.min(n - fitted, Math.max(2, nEffective - fitted)), n, nEffective };
}

/** The mean with its interval; the same as statistics.mean_interval. */
export function meanInterval(values, confidence = CONFIDENCE, covariate = null) {
  const { mean, error, dof, n, nEffective } = meanError(values, covariate);
  if (error === null) return { mean, lo: null, hi: null, n, nEffective: null };
  const half = error * tQuantile(0.5 + confidence / 2, dof);
  return { mean, lo: mean - half, hi: mean + half, n, nEffective };
}

/**
 * The confidence of each single interval so that `nCompared` of them hold together (Bonferroni), also where its width ended the
 * measurement at so many pairs (`lookingAt`); as statistics.corrected_confidence.
 */
export const corrected = (confidence, nCompared, lookingAt = FIRST_LOOK) => 1 - (1 - confidence) / (1 + LOOKING_COSTS * Math.log(Math.max(1, lookingAt / FIRST_LOOK))) / nCompared;

/** At most `n` stretches of about as many steps each, in order, none empty; as green_torch/experiment/recorded.py cuts a run. */
export function stretches(blocks, n = 20) {
  const total = blocks.reduce((sumSoFar, block) => sumSoFar + block.n_steps, 0);
  for (let parts = Math.min(n, blocks.length); parts > 0; parts -= 1) {
    const groups = Array.from({ length: parts }, () => []);
    let done = 0;
    for (const block of blocks) {
      groups[Math.min(parts - 1, Math.floor(((done + block.n_steps / 2) / total) * parts))].push(block);
      done += block.n_steps;
    }
    if (groups.every((group) => group.length)) return groups;
  }
  return [];
}

/** A relative interval of a rate, from its stretches: that of their arithmetic mean, ended at zero; [low, high] as factors of the rate, or null. */
export function spread(rates, confidence = CONFIDENCE) {
  const found = meanInterval(rates, confidence);
  return found.lo === null ? null : [Math.max(0, found.lo / found.mean), found.hi / found.mean];
}

/**
 * How much more b is than a (-0.12: 12 % less), of the rates of two runs that were measured apart: means of the logarithms with
 * Welch's interval (1947, Biometrika 34:28), each mean's spread allowing for autocorrelation. The same as experiment/recorded.py.
 * `instrument`: [lowest, highest] relative difference that the meters' bounds allow, or null; `gain`: [lowest, highest] factor by which
 * the sensors' gain errors may have changed the ratio, or null.
 */
export function difference(a, b, { instrument = null, gain = null, confidence = CONFIDENCE, nCompared = 1 } = {}) {
  const each = corrected(confidence, nCompared);
  const [of, to] = [meanError(a.map(Math.log)), meanError(b.map(Math.log))];
  const middle = to.mean - of.mean;
  const gained = gain && [Math.expm1(middle + Math.log(gain[0])), Math.expm1(middle + Math.log(gain[1]))];
  const found = { estimate: Math.expm1(middle), lo: null, hi: null, instrument, gained, nCompared, confidence, nPairs: null, distinguishable: false };
  if (of.error === null || to.error === null) return { ...found, note: "can't be told apart: one block of a run has no scatter to judge by" };
  const [va, vb] = [of, to].map(({ error, n, nEffective }) => (error ** 2 * (n - 1)) / (n - n / nEffective)); // as statistics.unpaired_difference
  const parts = va ** 2 / of.dof + vb ** 2 / to.dof;
  const half = Math.sqrt(va + vb) * tQuantile(0.5 + each / 2, parts ? (va + vb) ** 2 / parts : 1e7);
  const [lo, hi] = [Math.expm1(middle - half), Math.expm1(middle + half)];
  const spans = (ends) => ends && ends[0] <= 0 && ends[1] >= 0;
  const why = spans([lo, hi]) ? "the interval spans zero" : spans(instrument) ? "the meter's own bounds span zero"
    : spans(gained) ? "the sensors' gain errors, unlike each other, could make up the difference" : "";
  return { ...found, lo, hi, note: why && `can't be told apart: ${why}`, distinguishable: !why };
}

const logRatio = (a, b) => (a <= 0 ? Infinity : b <= 0 ? -Infinity : Math.log(b / a));

/**
 * How much more b is than a, of the blocks of two runs that were measured in turn: `a[k]` and `b[k]` are rates of one round, `gaps[k]` how
 * much later b's was. The same as statistics.paired_difference. `bounds`: [[[low, high] of each a], [the same of each b]], or null.
 */
export function pairedDifference(a, b, { gaps, bounds = null, gain = null, confidence = CONFIDENCE, nCompared = 1, looking = false }) {
  const { mean, lo, hi } = meanInterval(a.map((value, k) => logRatio(value, b[k])), corrected(confidence, nCompared, looking ? a.length : undefined), gaps);
  const out = (ends) => ends && ends.map(Math.expm1);
  const middle = (values) => sum(values) / values.length;
  const meter = bounds && [
    middle(bounds[0].map(([, high], k) => logRatio(high, bounds[1][k][0]))),
    middle(bounds[0].map(([low], k) => logRatio(low, bounds[1][k][1]))),
  ];
  const gained = gain && gain.map((factor) => mean + Math.log(factor));
  const spans = (ends) => ends && ends[0] <= 0 && ends[1] >= 0;
  const why = lo === null ? "one block of each has no scatter to judge by" : spans([lo, hi]) ? "the interval spans zero"
    : meter && (spans(meter) || meter[0] * lo < 0) ? "the meter's own bounds span zero"
      : spans(gained) ? "the sensors' gain errors, unlike each other, could make up the difference" : "";
  const [low, high] = lo === null ? [null, null] : out([lo, hi]);
  return {
    estimate: Math.expm1(mean), lo: low, hi: high, instrument: out(meter), gained: out(gained), nCompared, confidence, nPairs: a.length,
    note: why && `can't be told apart: ${why}`, distinguishable: !why,
  };
}

/**
 * By which factors the ratio of two sums over sensors may be off, each sensor being off by its own constant gain error: one sensor's
 * cancels, and one that states no error (null) stands at face value. [[joules of a, joules of b, gain error], …]; as statistics.gain_range,
 * null where there are several sensors and none states an error.
 */
export function gainRange(sensors) {
  const used = sensors.filter(([a, b]) => a || b);
  if (!used.length || used.some(([a, b]) => !(a >= 0 && b >= 0))) return null;
  if (used.length === 1) return [1, 1];
  const stated = used.map(([, , error]) => error).filter((error) => error !== null);
  if (!stated.length || !stated.every((error) => error >= 0 && error < 1)) return null;
  used.sort(([a, b], [c, d]) => (a ? b / a : Infinity) - (c ? d / c : Infinity));
  const ratio = (gains) => sum(used.map(([, b], k) => gains[k] * b)) / sum(used.map(([a], k) => gains[k] * a));
  const plain = ratio(used.map(() => 1));
  const ratios = [];
  for (let split = 0; split <= used.length; split += 1) {
    for (const sign of [1, -1]) ratios.push(ratio(used.map(([, , error], k) => 1 + (error ?? 0) * (k >= split ? sign : -sign))) / plain);
  }
  return [Math.min(...ratios), Math.max(...ratios)];
}
