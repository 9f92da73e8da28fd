// The Green tab: TensorBoard calls render() once, in an empty frame of ours.

export async function render() {
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
    await start(document.body);
  } catch (error) {
    const told = document.createElement("p");
    told.textContent = `The Green tab can't start: ${error.message}. Reload the page; if it stays, pip install --upgrade green-torch.`;
    document.body.append(told);
  }
}
