// Numbers as a person reads them; the same texts as green_torch/units.py.

const PREFIXES = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "µ"], [1e-9, "n"]];
const J_PER_WH = 3600;
export const J_PER_KWH = 3.6e6;
export const UNKNOWN = "–";

export const known = (value) => typeof value === "number" && Number.isFinite(value);

/** So many significant digits: 99.996 reads "100", not "100.0". */
export function digits(value, n = 3) {
  const rounded = Number(value.toPrecision(n));
  if (rounded === 0) return "0";
  const whole = Math.abs(rounded) >= 1 ? String(Math.trunc(Math.abs(rounded))).length : 1;
  return rounded.toFixed(Math.min(20, Math.max(0, n - whole)));
}

/** si(0.00123, "J") is "1.23 mJ". */
export function si(value, unit, n = 3) {
  if (!known(value)) return UNKNOWN;
  if (value === 0) return `0 ${unit}`.trim();
  for (const [scale, prefix] of PREFIXES) {
    if (Math.abs(value) >= scale * (1 - 0.5 * 10 ** -n)) return `${digits(value / scale, n)} ${prefix}${unit}`.trim();
  }
  return `${value.toPrecision(n)} ${unit}`.trim();
}

/** "28.1 – 29.3 mJ": where both ends read in one unit it is said once. */
export function span(format, lo, hi, between = " – ") {
  const [low, high] = [format(lo), format(hi)];
  const cut = low.indexOf(" ");
  const same = cut > 0 && low.slice(cut) === high.slice(high.indexOf(" ")) && low.indexOf(" ", cut + 1) < 0;
  return `${same ? low.slice(0, cut) : low}${between}${high}`;
}

/** An instant on an axis: no more digits than it has. */
export const clock = (seconds) => (Math.abs(seconds) < 60 ? `${Number(seconds.toPrecision(4))} s` : duration(seconds));

/** A number on an axis. */
export const tick = (value) => (Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-4) ? plain(value, 2) : String(Number(value.toPrecision(4))).replace("-", "−"));

/** Grams of CO2 equivalent, from µg to t. */
export function grams(value, n = 3) {
  if (known(value) && Math.abs(value) >= 1e6 * (1 - 0.5 * 10 ** -n)) return `${digits(value / 1e6, n)} tCO2e`;
  return si(value, "gCO2e", n);
}

/** Joules as watt-hours with a prefix. */
export const wattHours = (joules, n = 3) => si(known(joules) ? joules / J_PER_WH : null, "Wh", n);

/** A fraction as a percentage. */
export const percent = (value, n = 3) => (known(value) ? `${digits(100 * value, n)} %` : UNKNOWN);

/** A relative change with its sign; beyond doubling as a ratio. */
export function change(value) {
  if (!known(value)) return UNKNOWN;
  if (value >= 1) return `×${digits(1 + value, 3)}`;
  const points = 100 * value;
  const text = Math.abs(points) < 9.995 ? Math.abs(points).toFixed(Math.abs(points) < 0.995 ? 2 : 1) : Math.abs(points).toFixed(1);
  return `${points < 0 ? "−" : "+"}${text} %`;
}

/** Bytes in binary units. */
export function bytes(value) {
  if (!known(value)) return UNKNOWN;
  let scaled = value;
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (Math.abs(scaled) < 1024 || unit === "TiB") return `${unit === "B" ? scaled : digits(scaled, 3)} ${unit}`;
    scaled /= 1024;
  }
  return UNKNOWN;
}

const COUNTS = [[1e15, "quadrillion"], [1e12, "trillion"], [1e9, "billion"], [1e6, "million"]];

/** 1e10 is "10 billion"; below a million the plain number. */
export function count(value) {
  if (!known(value)) return UNKNOWN;
  for (const [scale, word] of COUNTS) {
    if (Math.abs(value) >= scale * 0.9995) return `${Number(digits(value / scale, 3))} ${word}`;
  }
  return integer(value);
}

/** Digits in groups of three. */
export const integer = (value) => (known(value) ? Math.round(value).toLocaleString("en-US") : UNKNOWN);

/** Seconds as "1 d 4 h", "3 min 20 s", "12.3 ms". */
export function duration(seconds) {
  if (!known(seconds)) return UNKNOWN;
  if (Math.abs(seconds) < 60) return si(seconds, "s");
  const parts = [];
  let rest = Math.round(seconds);
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]]) {
    const whole = Math.floor(rest / size);
    if (whole || parts.length) parts.push([whole, unit]);
    rest -= whole * size;
  }
  return parts.slice(0, 2).filter(([n]) => n).map(([n, unit]) => `${integer(n)} ${unit}`).join(" ");
}

/** Hours of a planned run. */
export function hours(value) {
  if (!known(value)) return UNKNOWN;
  if (Math.abs(value) < 1) return duration(value * 3600);
  return Math.abs(value) < 1000 ? `${digits(value, 3)} h` : `${integer(Number(value.toPrecision(3)))} h`;
}

/** An amount of money, in whatever currency the price was given in. */
export function money(value) {
  if (!known(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1000) return integer(Number(value.toPrecision(4)));
  return size >= 0.01 ? value.toFixed(2) : value.toPrecision(2);
}

/** Loss and the like. */
export function plain(value, n = 4) {
  if (!known(value)) return UNKNOWN;
  if (value === 0) return "0";
  const size = Math.abs(value);
  return (size >= 1e6 || size < 1e-4 ? value.toExponential(n - 1) : digits(value, n)).replaceAll("-", "−");
}

/** Names can have 10,000 characters. */
export function short(text, n = 48) {
  const all = [...String(text).slice(0, 4 * n)];
  return all.length <= n ? String(text) : `${all.slice(0, n - 1).join("")}…`;
}
