// The Green tab: TensorBoard calls render() once, in an empty frame of ours.

const PARTS = ["app", "charts", "compare", "data", "dom", "format", "frontier", "host", "phases", "savings", "stats", "timeline"];

export async function render() {
  const early = fetch(new URL("runs", import.meta.url)); // on its way while the code is
  early.catch(() => {}); // told by whoever awaits it
  for (const name of PARTS) {
    const part = document.createElement("link");
    part.rel = "modulepreload"; // all at once, where one would ask for the next
    part.href = new URL(`${name}.js`, import.meta.url).href;
    document.head.append(part);
  }
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = new URL("green.css", import.meta.url).href;
  const ready = new Promise((resolve) => {
    style.onload = resolve;
    style.onerror = resolve;
  });
  document.head.append(style);
  document.documentElement.lang = "en";
  document.title = "Green";
  try {
    const [{ start }] = await Promise.all([import("./app.js"), ready]);
    await start(document.body, early);
  } catch (error) {
    const told = document.createElement("p");
    told.textContent = `The Green tab can't start: ${error.message}. Reload the page; if it stays, pip install --upgrade green-torch.`;
    document.body.append(told);
  }
}
