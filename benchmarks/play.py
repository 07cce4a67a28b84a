"""Time the page of `sana play` in a browser, from key stroke to picture; take its screenshot.

    python benchmarks/play.py shipped --steps 1 2 8
    python benchmarks/play.py shipped --screenshot docs/play.png --prompt "2 0 2 6"

It needs Chromium (apt-get install chromium). The time is from the key's event to the frame after the
picture is decoded, without a screen.
"""

import argparse
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, Playwright, sync_playwright

MOST_STROKES = 16
# resolves once the picture that follows a change is on the page; answers with milliseconds
STROKE = """([prompt, kind]) => new Promise(resolve => {
  const box = document.getElementById("prompt"), picture = document.getElementById("picture");
  const start = performance.now();
  new MutationObserver((_, observer) => {
    observer.disconnect();
    const end = () => requestAnimationFrame(() => resolve(performance.now() - start));
    picture.decode().then(end, end);
  }).observe(picture, { attributes: true, attributeFilter: kind === "final" ? ["data-seed"] : ["src"] });
  box.value = prompt;
  box.dispatchEvent(new Event("input"));
})"""


def set_slider(page: Page, name: str, value: float) -> None:
    """Move a slider as a person does."""
    page.evaluate(
        f"value => {{ {name}.value = value; {name}.dispatchEvent(new Event('input')); }}", str(value)
    )


def measure(page: Page, prompts: list[str], kind: str) -> str:
    """Median and worst time of key strokes. `kind`: of the first or the final picture."""
    times = []
    for prompt in prompts:
        times.append(page.evaluate(STROKE, [prompt, kind]))
        page.wait_for_timeout(400)  # a person's pause, in which the variations end
    return f"{statistics.median(times):4.0f} ms, at most {max(times):4.0f}"


def visit(serving: "subprocess.Popen[str]", playwright: Playwright, asked: argparse.Namespace) -> None:
    """Open the page that a process serves, and do what is asked."""
    assert serving.stdout is not None
    url = serving.stdout.readline().strip()
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page(
        viewport={"width": asked.width, "height": 800}, color_scheme="dark" if asked.dark else "light"
    )
    page.goto(url)
    page.wait_for_selector("#picture[data-seed]")
    if asked.screenshot is not None:
        if asked.prompt:
            page.fill("#prompt", asked.prompt)
        page.wait_for_selector("#stage[aria-busy=false]")
        page.screenshot(path=asked.screenshot, full_page=True)
    else:
        prompt = page.evaluate("about.prompt")
        strokes = [prompt[:end] for end in range(1, min(len(prompt), MOST_STROKES) + 1)]
        for steps in asked.steps:
            set_slider(page, "steps", steps)
            page.wait_for_timeout(500)
            for kind in ("first", "final"):
                print(f"{steps} steps, {kind} picture: {measure(page, strokes, kind)}")
    browser.close()


def main() -> None:
    """Measure, or take the screenshot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--encoder")
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--prompt", help="of the screenshot")
    parser.add_argument("--screenshot", type=Path, help="a PNG, 1120 pixels wide")
    parser.add_argument("--width", type=int, default=1120)
    parser.add_argument("--dark", action="store_true")
    asked = parser.parse_args()
    encoder = ["--encoder", asked.encoder] if asked.encoder else []
    command = [sys.executable, "-m", "sana_cli", "play", asked.checkpoint, "--device", "cpu", *encoder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        try:
            with sync_playwright() as playwright:
                visit(serving, playwright, asked)
        finally:
            serving.send_signal(signal.SIGINT)


if __name__ == "__main__":
    main()
