"""Takes the README's pictures, examples/green_tab.png and examples/tensorboard.png, of a real comparison on this machine.

``python benchmarks/pictures.py`` (about four minutes on two cores; needs Chromium, and a machine that does nothing else): trains the built-in
GPT with ``green-torch compare``, opens a real TensorBoard over the runs and takes the pictures. ``python benchmarks/pictures.py DIR``
takes them of runs that are there already. Look at both before they are committed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.green_page import CHROMIUM, Tab, chromium
from tests.green_runs import tensorboard, wait_for_runs

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("fp32", "bf16", "bf16+flash")
SCALARS = "green/(energy_per_token|step_time|mfu|emissions_total)"
SETTLED_MS = 1500


def measure(log_dir: Path) -> None:
    """The comparison, as the command makes it; what it found is printed."""
    command = [sys.executable, "-m", "green_torch.cli", "compare", "--variants", ",".join(VARIANTS), "--region", "FR"]
    subprocess.run([*command, "--size", "1M", "--log-dir", str(log_dir)], check=True, cwd=ROOT)


def take(log_dir: Path) -> None:
    """Both pictures."""
    n_runs = len({path.parent for path in log_dir.rglob("events.out.tfevents.*")})
    with tensorboard(log_dir) as address, chromium() as browser:
        wait_for_runs(address, n_runs)
        page = browser.new_page(viewport={"width": 1440, "height": 960})
        tab = Tab(page, address).open()
        tab.wait_until("!document.querySelector('.comparison').innerText.includes('…')")
        page.wait_for_timeout(SETTLED_MS)
        page.screenshot(path=ROOT / "examples" / "green_tab.png")
        page.set_viewport_size({"width": 1280, "height": 1000})
        page.goto("about:blank")
        page.goto(f"{address}/#timeseries")
        page.get_by_role("combobox", name="Filter tags (regex)").fill(SCALARS)
        page.keyboard.press("Escape")  # the list of tags that match
        page.locator("button:has-text('Settings')").click()  # its pane takes a third of the picture
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(SETTLED_MS)
        page.screenshot(path=ROOT / "examples" / "tensorboard.png")


def main() -> None:
    """Measures where no directory is named, and takes the pictures."""
    if CHROMIUM is None:
        sys.exit("there is no Chromium here: apt-get install chromium")
    if sys.argv[1:]:
        take(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder))
        take(Path(folder))


if __name__ == "__main__":
    main()
