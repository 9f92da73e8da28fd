// Building elements. Text goes in through textContent alone, so a run may be called anything.

const SVG = "http://www.w3.org/2000/svg";

function build(element, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, own] of Object.entries(value)) element.style.setProperty(key, own);
    else if (name === "value" && "value" in element) element.value = value;
    else if (name === "checked") element.checked = Boolean(value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false || child === "") continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

/** h("p", {class: "note"}, "text", child, …) */
export const h = (tag, properties, ...children) => build(document.createElement(tag), properties, children);

/** The same for SVG. */
export const s = (tag, properties, ...children) => build(document.createElementNS(SVG, tag), properties, children);

/** Lets the browser draw and answer in between: what follows goes on in another task. */
export function turn() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

const A_TURN = 12;

/** What `work` makes of each, a dozen in a task; null where `wanted` says meanwhile that nobody waits for it any more. */
export async function inTurns(items, work, wanted = () => true) {
  const made = [];
  for (const item of items) {
    if (made.length && made.length % A_TURN === 0) {
      await turn();
      if (!wanted()) return null;
    }
    made.push(work(item));
  }
  return made;
}

const scrolled = new Map(); // [left, top] by data-scroll: asking an element itself would lay out the page

document.addEventListener("scroll", ({ target }) => {
  if (target.dataset?.scroll) scrolled.set(target.dataset.scroll, [target.scrollLeft, target.scrollTop]);
}, { capture: true, passive: true });

/** Puts new children in, keeping the keyboard where it was: elements are told apart by their data-key. */
export function fill(parent, ...children) {
  const active = document.activeElement;
  const key = active && parent.contains(active) ? active.closest("[data-key]")?.dataset.key : undefined;
  parent.replaceChildren();
  append(parent, children);
  for (const one of parent.querySelectorAll("[data-scroll]")) {
    const [left, top] = scrolled.get(one.dataset.scroll) ?? [0, 0];
    if (left || top) Object.assign(one, { scrollLeft: left, scrollTop: top });
  }
  if (key !== undefined) [...parent.querySelectorAll("[data-key]")].find((one) => one.dataset.key === key)?.focus({ preventScroll: true });
}

/** A table whose rows a narrow window shows as lists of named values; roles keep it a table for screen readers there. */
export function foldable(table) {
  const titles = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.replace(/[↑↓]/, ""));
  table.classList.add("foldable");
  table.setAttribute("role", "table");
  for (const group of [table.tHead, ...table.tBodies]) group.setAttribute("role", "rowgroup");
  for (const row of table.rows) {
    row.setAttribute("role", "row");
    [...row.cells].forEach((cell, k) => {
      cell.setAttribute("role", cell.scope === "col" ? "columnheader" : cell.scope === "row" ? "rowheader" : "cell");
      if (cell.tagName === "TD") cell.dataset.label = titles[k];
    });
  }
  return table;
}

/** A name that is cut where it is long, whole on hover, and kept from turning the text around it right to left. */
export const named = (text, properties = {}) =>
  h("bdi", { ...properties, class: `name ${properties.class ?? ""}`, title: String(text).slice(0, 500) }, String(text).slice(0, 300));

let toastTimer = 0;

/** Says something for a moment, to screen readers too. */
export function toast(text) {
  const place = document.getElementById("toast");
  place.textContent = text;
  place.classList.add("shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => place.classList.remove("shown"), 2500);
}

/** Copies text; where the browser keeps its clipboard to itself (plain HTTP), through a selection. */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "offscreen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(`Copied ${what}`);
}
