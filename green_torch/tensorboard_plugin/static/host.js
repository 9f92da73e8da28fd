// The page around us: TensorBoard's messages, its dark mode, its address. Each of them may be out of reach (a notebook's proxy).

/** Calls back when TensorBoard has reloaded its data. Speaks the protocol of TensorBoard's own plugin library over a message channel. */
export function onReload(callback) {
  if (window.parent === window) return;
  try {
    const channel = new MessageChannel();
    channel.port1.onmessage = (event) => {
      const message = JSON.parse(event.data);
      if (message.isReply) return;
      channel.port1.postMessage(JSON.stringify({ type: message.type, id: message.id, payload: null, error: null, isReply: true }));
      if (message.type === "experimental.DataReloaded" || message.type === "experimental.RunsChanged") callback();
    };
    window.parent.postMessage("experimental.bootstrap", "*", [channel.port2]);
  } catch {
    // the page is still refreshed by its own clock
  }
}

/** TensorBoard marks its body; without that, the system's wish counts. */
export function followDarkMode() {
  const root = document.documentElement;
  const set = (dark) => root.classList.toggle("dark", dark);
  try {
    const { body } = window.parent.document;
    if (window.parent === window) throw new Error("not in a frame");
    const read = () => set(body.classList.contains("dark-mode"));
    new MutationObserver(read).observe(body, { attributes: true, attributeFilter: ["class"] });
    read();
  } catch {
    const wish = window.matchMedia("(prefers-color-scheme: dark)");
    wish.addEventListener("change", () => set(wish.matches));
    set(wish.matches);
  }
}

const PREFIX = "green.";

function frame() {
  try {
    void window.parent.location.hash;
    return window.parent;
  } catch {
    return window;
  }
}

function parts() {
  return frame().location.hash.slice(1).split("&").filter(Boolean);
}

/** What the address says of our own settings. */
export function readAddress() {
  const found = {};
  for (const part of parts()) {
    const [key, value, more] = part.split("=");
    if (value === undefined || more !== undefined) continue;
    try {
      const name = decodeURIComponent(key);
      if (name.startsWith(PREFIX)) found[name.slice(PREFIX.length)] = decodeURIComponent(value);
    } catch {
      // not written by us
    }
  }
  return found;
}

/** Writes our settings into the address, and leaves what others keep there. */
export function writeAddress(settings) {
  const own = Object.entries(settings).map(([key, value]) => `${encodeURIComponent(PREFIX + key)}=${encodeURIComponent(value)}`);
  const others = parts().filter((part) => !part.startsWith(encodeURIComponent(PREFIX)));
  const where = frame();
  const hash = `#${[...others, ...own].join("&")}`;
  if (hash === where.location.hash || (hash === "#" && !where.location.hash)) return;
  try {
    where.history.replaceState(where.history.state, "", hash);
  } catch {
    // a sandboxed frame
  }
}

/** Calls back when somebody else changed the address: a link followed, the back button. */
export function onAddress(callback) {
  frame().addEventListener("hashchange", callback);
}
