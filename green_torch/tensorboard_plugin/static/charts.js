// Charts, drawn as SVG by hand: bars with whiskers, and lines with bands, shades and a zoom.

import { h, s, turn } from "./dom.js";
import { known, short } from "./format.js";

/** Round numbers across a range, about so many. */
export function ticks(lo, hi, about = 5) {
  if (!(hi > lo)) return [lo];
  const rough = (hi - lo) / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(lo / step - 1e-9); k * step <= hi + step * 1e-9; k += 1) found.push(k * step);
  return found;
}

const TIMES_S = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400];

/** Round instants across a range of seconds: whole minutes, hours or days where it is so long. */
export function timeTicks(lo, hi, about = 5) {
  const rough = (hi - lo) / about;
  const step = TIMES_S.find((size) => size >= rough * 0.8);
  if (rough < 1) return ticks(lo, hi, about);
  if (!step) return ticks(lo / 86_400, hi / 86_400, about).map((days) => days * 86_400);
  return Array.from({ length: Math.floor(hi / step) - Math.ceil(lo / step) + 1 }, (_, k) => (Math.ceil(lo / step) + k) * step);
}

const MANY = 24; // bars or lines: a chart of more is drawn in a task of its own

/** Draws again whenever the element's width changes. */
function responsive(element, draw, size, height) {
  let width = 0;
  element.style.minHeight = `${height}px`;
  new ResizeObserver(async () => {
    if (size > MANY) await turn();
    const next = Math.floor(element.clientWidth);
    if (next > 0 && next !== width) draw((width = next));
  }).observe(element);
}

const BAR = 14;
const ROW = 26;
const TALLEST = 420; // as green.css has it: more is scrolled

/**
 * Horizontal bars. rows: [{name, color, bars: [{value, lo, hi, faint}]}]; where a row has more bars than one they stand below each
 * other. Unknown values read as a dash.
 */
export function bars({ label, rows, format, max = null }) {
  const frame = h("div", { class: "chart bars", "data-scroll": `bars ${label}` });
  const ends = rows.flatMap((row) => row.bars.flatMap((bar) => [bar.value, bar.hi])).filter(known);
  const top = max ?? (Math.max(0, ...ends) || 1);
  const thick = rows[0]?.bars.length > 1 ? 9 : BAR;
  const each = Math.max(ROW, rows[0]?.bars.length * (thick + 3) + 8);
  const height = rows.length * each + 4;
  responsive(frame, (width) => {
    const names = Math.min(190, Math.max(76, width * 0.33));
    const values = 84;
    const span = Math.max(30, width - names - values);
    const x = (value) => names + (Math.min(value, top) / top) * span;
    const picture = s("svg", { width, height, role: "img", "aria-label": describe(label, rows, format) });
    picture.append(s("line", { class: "axis", x1: names, x2: names, y1: 0, y2: rows.length * each }));
    rows.forEach((row, k) => {
      const middle = k * each + each / 2;
      const name = s("text", { class: "bar-name", x: names - 8, y: middle, "text-anchor": "end" }, short(row.name, Math.floor(names / 7.9)));
      name.append(s("title", {}, row.name.slice(0, 500)));
      picture.append(name);
      const shown = row.bars.filter((bar) => known(bar.value));
      (shown.length ? shown : [{}]).forEach((bar, n, all) => {
        const y = middle + (n - all.length / 2) * (thick + 3) + 1.5;
        if (!known(bar.value)) {
          picture.append(s("text", { class: "bar-value", x: names + 6, y: y + thick / 2 }, "–"));
          return;
        }
        const end = x(bar.value);
        picture.append(s("rect", { class: bar.faint ? "bar faint" : "bar", x: names, y, width: Math.max(1, end - names), height: thick, rx: 2, style: { fill: row.color, stroke: row.color } }));
        let after = end;
        if (known(bar.lo) && known(bar.hi)) {
          const [lo, hi] = [x(Math.max(0, bar.lo)), x(bar.hi)];
          const at = y + thick / 2;
          picture.append(s("path", { class: "whisker", d: `M${lo} ${at - 4}V${at + 4}M${lo} ${at}H${hi}M${hi} ${at - 4}V${at + 4}` }));
          after = Math.max(end, hi);
        }
        picture.append(s("text", { class: "bar-value", x: after + 6, y: y + thick / 2 }, format(bar.value)));
      });
    });
    frame.replaceChildren(picture);
  }, rows.length, Math.min(height, TALLEST));
  return frame;
}

const describe = (label, rows, format) =>
  `${label}: ${rows.slice(0, 20).map((row) => `${short(row.name, 40)} ${row.bars.map((bar) => (known(bar.value) ? format(bar.value) : "not known")).join(" and ")}`).join("; ")}`;

const LABEL = 16;
const NAMED = 74; // a shade wide enough for its name
const MARGIN = { top: 10, right: 14, bottom: 26, left: 62 };

/** The extremes of each pixel column: a line of any length looks the same with a few thousand points. */
function thinned(points, x, limit) {
  if (points.length <= limit) return points;
  const found = [];
  let column = null;
  let lowest = null;
  let highest = null;
  const close = () => {
    if (lowest) found.push(...(lowest[0] <= highest[0] ? [lowest, highest] : [highest, lowest]));
  };
  for (const point of points) {
    const own = Math.round(x(point[0]));
    if (Number.isNaN(point[1])) {
      close();
      found.push(point);
      [column, lowest, highest] = [null, null, null];
    } else if (own !== column) {
      close();
      [column, lowest, highest] = [own, point, point];
    } else {
      if (point[1] < lowest[1]) lowest = point;
      if (point[1] > highest[1]) highest = point;
    }
  }
  close();
  return found;
}

/**
 * Lines over x. series: [{name, color, dash, points: [[x, y]], band: [[x, lo, hi]], faint, steps}]; shades: [{from, to, name, kind}].
 * `view` is {from, to} or null (all of it); a drag, + - ← → 0 and double click change it through `onView`.
 */
export function lines({ label, series, shades = [], xFormat, yFormat, xLabel, view, onView, xTicks = ticks, xFromZero = false, height = 260, fromZero = false, marks = [] }) {
  const tip = h("div", { class: "tip", hidden: true });
  const canvas = h("div", { class: "canvas" });
  const frame = h("div", { class: "chart lines", tabindex: 0, role: "group", "data-key": `chart ${label}`, "aria-label": `${label}. Plus and minus zoom, left and right move, 0 shows all.` }, canvas, tip);
  const spans = [...series.flatMap((one) => (one.points.length ? [one.points[0][0], one.points.at(-1)[0]] : [])), ...shades.flatMap((shade) => [shade.from, shade.to]), ...(xFromZero ? [0] : [])];
  const whole = { from: Math.min(...spans), to: Math.max(...spans) };
  if (!(whole.to > whole.from)) [whole.from, whole.to] = [whole.from - 0.5, whole.to + 0.5];
  const seen = () => (view && view.to > view.from ? view : whole);
  let geometry = null;

  const draw = (width) => {
    const { from, to } = seen();
    const [w, tall] = [Math.max(60, width - MARGIN.left - MARGIN.right), height - MARGIN.top - MARGIN.bottom - (xLabel ? LABEL : 0)];
    const x = (value) => MARGIN.left + ((value - from) / (to - from)) * w;
    const inside = (points) => cut(points, from, to);
    const drawn = series.map((one) => ({ ...one, points: inside(one.points), band: one.band ? inside(one.band) : null }));
    const ys = drawn.flatMap((one) => one.points.map((point) => point[1])).filter(known);
    let lo = ys.reduce((a, b) => Math.min(a, b), Infinity);
    let hi = ys.reduce((a, b) => Math.max(a, b), -Infinity);
    if (fromZero) lo = Math.min(0, lo);
    const reach = hi + 0.35 * (hi - lo || Math.abs(hi) || 1); // a band may go further than the chart
    for (const one of drawn) for (const [, low, high] of one.band ?? []) if (known(low)) [lo, hi] = [Math.min(lo, Math.max(low, fromZero ? 0 : lo - 0.35 * (hi - lo))), Math.max(hi, Math.min(high, reach))];
    if (!(hi > lo)) [lo, hi] = lo === 0 ? [0, 1] : [lo - Math.abs(lo || 1) * 0.1, hi + Math.abs(hi || 1) * 0.1];
    const pad = (hi - lo) * 0.06;
    [lo, hi] = [fromZero && lo === 0 ? 0 : lo - pad, hi + pad];
    const [first, second] = ticks(lo, hi, 4);
    if (lo === 0 && second > first) hi = Math.ceil(hi / (second - first)) * (second - first); // up to a round number
    const y = (value) => MARGIN.top + (1 - (value - lo) / (hi - lo)) * tall;
    const clip = `clip-${Math.random().toString(36).slice(2)}`;
    const picture = s("svg", { width, height, role: "img", "aria-label": spoken(label, drawn, yFormat) });
    picture.append(s("clipPath", { id: clip }, s("rect", { x: MARGIN.left, y: MARGIN.top, width: w, height: tall })));
    for (const value of ticks(lo, hi, 4)) {
      picture.append(s("line", { class: "grid", x1: MARGIN.left, x2: MARGIN.left + w, y1: y(value), y2: y(value) }));
      picture.append(s("text", { class: "tick", x: MARGIN.left - 8, y: y(value), "text-anchor": "end" }, yFormat(value)));
    }
    for (const value of xTicks(from, to, Math.max(3, Math.floor(w / 110)))) {
      picture.append(s("line", { class: "tickmark", x1: x(value), x2: x(value), y1: MARGIN.top + tall, y2: MARGIN.top + tall + 4 }));
      picture.append(s("text", { class: "tick under", x: x(value), y: MARGIN.top + tall + 15, "text-anchor": x(value) > width - 36 ? "end" : "middle" }, xFormat(value)));
    }
    const body = s("g", { "clip-path": `url(#${clip})` });
    for (const shade of shades) {
      const [a, b] = [x(shade.from), x(shade.to)];
      if (b < MARGIN.left || a > MARGIN.left + w) continue;
      body.append(s("rect", { class: `shade ${shade.kind}`, x: a, y: MARGIN.top, width: Math.max(1.5, b - a), height: tall }, s("title", {}, shade.name)));
      if (b - a > NAMED) body.append(s("text", { class: "shade-name", x: Math.max(a, MARGIN.left) + 6, y: MARGIN.top + 10 }, shade.word));
    }
    for (const one of drawn) {
      if (!one.band?.length) continue;
      const at = (p, side) => `${x(p[0]).toFixed(1)} ${y(p[side]).toFixed(1)}`;
      const d = pieces(thinned(one.band, x, 2 * w)).map((edge) => `M${edge.map((p) => at(p, 2)).join("L")}L${[...edge].reverse().map((p) => at(p, 1)).join("L")}Z`).join("");
      body.append(s("path", { class: "band", d, style: { fill: one.color } }));
    }
    for (const one of drawn) {
      const points = thinned(one.points, x, 2 * w);
      if (!points.length) continue;
      const at = (p) => `${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`;
      body.append(s("path", { class: one.faint ? "line faint" : "line", d: pieces(points).map((piece) => `M${piece.map(at).join("L")}`).join(""), style: { stroke: one.color, "stroke-dasharray": one.dash ?? "none" } }));
      if (points.length === 1) body.append(s("circle", { cx: x(points[0][0]), cy: y(points[0][1]), r: 3, style: { fill: one.color } }));
    }
    for (const mark of marks) {
      if (known(mark.y)) body.append(s("line", { class: "mark", x1: MARGIN.left, x2: MARGIN.left + w, y1: y(mark.y), y2: y(mark.y) }));
      if (known(mark.x)) body.append(s("circle", { class: "dot", cx: x(mark.x), cy: y(mark.y), r: 4, style: { fill: mark.color } }));
    }
    picture.append(body);
    picture.append(s("line", { class: "axis", x1: MARGIN.left, x2: MARGIN.left + w, y1: MARGIN.top + tall, y2: MARGIN.top + tall }));
    if (xLabel) picture.append(s("text", { class: "axis-label", x: MARGIN.left + w, y: height - 8, "text-anchor": "end" }, xLabel));
    const cross = s("line", { class: "cross", y1: MARGIN.top, y2: MARGIN.top + tall, visibility: "hidden" });
    const brush = s("rect", { class: "brush", y: MARGIN.top, height: tall, visibility: "hidden" });
    picture.append(cross, brush);
    canvas.replaceChildren(picture);
    geometry = { w, from, to, drawn, cross, brush, width };
  };

  const valueAt = (event) => {
    const box = canvas.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left - MARGIN.left) / geometry.w));
    return { value: geometry.from + share * (geometry.to - geometry.from), px: MARGIN.left + share * geometry.w };
  };
  let start = null;
  canvas.addEventListener("pointermove", (event) => {
    if (!geometry) return;
    const { value, px } = valueAt(event);
    if (start !== null) {
      const [a, b] = [Math.min(start.px, px), Math.max(start.px, px)];
      for (const [key, own] of [["x", a], ["width", b - a], ["visibility", "visible"]]) geometry.brush.setAttribute(key, own);
      tip.hidden = true;
      return;
    }
    const near = geometry.drawn.filter((one) => !one.faint && one.points.length).map((one) => [one, nearest(one.points.filter((point) => known(point[1])), value)]).filter(([, point]) => point);
    if (!near.length) return;
    const anchor = near.reduce((a, b) => (Math.abs(b[1][0] - value) < Math.abs(a[1][0] - value) ? b : a))[1][0];
    const at = MARGIN.left + ((anchor - geometry.from) / (geometry.to - geometry.from)) * geometry.w;
    geometry.cross.setAttribute("x1", at);
    geometry.cross.setAttribute("x2", at);
    geometry.cross.setAttribute("visibility", "visible");
    tip.replaceChildren(
      h("div", { class: "tip-x" }, `${xFormat(anchor)}${xLabel ? ` ${xLabel}` : ""}`),
      ...near.slice(0, 12).map(([one, point]) => h("div", { class: "tip-row" }, h("i", { class: "swatch", style: { "--c": one.color } }), h("bdi", {}, short(one.name, 28)), h("b", {}, yFormat(point[1])))),
    );
    tip.hidden = false;
    tip.style.left = `${Math.min(at + 12, Math.max(0, geometry.width - tip.offsetWidth - 4))}px`;
  });
  const leave = () => {
    tip.hidden = true;
    geometry?.cross.setAttribute("visibility", "hidden");
  };
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !geometry) return;
    start = valueAt(event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (start === null) return;
    const end = valueAt(event);
    geometry.brush.setAttribute("visibility", "hidden");
    const [a, b] = [Math.min(start.value, end.value), Math.max(start.value, end.value)];
    if (Math.abs(end.px - start.px) > 5) onView({ from: a, to: b });
    start = null;
  });
  canvas.addEventListener("dblclick", () => onView(null));
  frame.addEventListener("keydown", (event) => {
    const { from, to } = seen();
    const [size, middle] = [to - from, (from + to) / 2];
    const moves = {
      "+": [middle - size / 4, middle + size / 4],
      "=": [middle - size / 4, middle + size / 4],
      "-": [middle - size, middle + size],
      ArrowLeft: [from - size / 4, to - size / 4],
      ArrowRight: [from + size / 4, to + size / 4],
    };
    if (event.key === "0" || event.key === "Escape") onView(null);
    else if (moves[event.key]) {
      const [a, b] = moves[event.key];
      const width = Math.min(b - a, whole.to - whole.from);
      const left = Math.min(Math.max(a, whole.from), whole.to - width);
      onView(width >= whole.to - whole.from ? null : { from: left, to: left + width });
    } else return;
    event.preventDefault();
  });
  responsive(canvas, draw, series.length, height);
  return frame;
}

/** What lies between the gaps. */
function pieces(points) {
  const found = [[]];
  for (const point of points) {
    if (Number.isNaN(point[1])) found.push([]);
    else found.at(-1).push(point);
  }
  return found.filter((piece) => piece.length);
}

/** The points inside, and the next one at either side so that the line reaches the edge. */
function cut(points, from, to) {
  let first = 0;
  while (first < points.length - 1 && points[first + 1][0] < from) first += 1;
  let last = points.length - 1;
  while (last > first && points[last - 1][0] > to) last -= 1;
  return points.slice(first, last + 1);
}

function nearest(points, value) {
  let [lo, hi] = [0, points.length - 1];
  while (hi - lo > 1) {
    const middle = (lo + hi) >> 1;
    if (points[middle][0] < value) lo = middle;
    else hi = middle;
  }
  return Math.abs(points[lo][0] - value) <= Math.abs(points[hi][0] - value) ? points[lo] : points[hi];
}

const spoken = (label, drawn, format) =>
  `${label}: ${drawn.filter((one) => !one.faint && one.points.length).slice(0, 12).map((one) => `${short(one.name, 40)} from ${format(one.points[0][1])} to ${format(one.points.at(-1)[1])}`).join("; ")}`;
