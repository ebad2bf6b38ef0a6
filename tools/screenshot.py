"""Takes the picture of a report that the README and the documentation show.

    make demo
    python tools/screenshot.py

It opens `results/llama-stdlib.html` in headless Chromium, light, 1280 pixels wide at two device
pixels each, selects a head, and writes the section of heads, down to the map of that head, to
`docs/assets/diagnosis.png`. Other pages, sections and heads: `--help`. The colours are reduced to
256 to make the file smaller; a picture over the limit is an error.
"""

import argparse
import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT, SCALE = 1280, 900, 2
MARGIN = 16  # of the page, above and below
LIMIT = 400_000  # bytes


def photograph(page_path: Path, first: str, last: str, head: str) -> bytes:
    """The page from the top of one element to the bottom of another, at rest."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("chromium-browser"),
            chromium_sandbox=os.geteuid() != 0,
            args=["--disable-gpu"],
        )
        context = chromium.new_context(
            offline=True,
            viewport={"width": WIDTH, "height": HEIGHT},
            device_scale_factor=SCALE,
            color_scheme="light",
            reduced_motion="reduce",
        )
        page = context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_path.as_uri() + (f"#{head}" if head else ""))
        page.wait_for_load_state("networkidle")
        if head:
            page.wait_for_selector("#head-map svg, #head-map canvas", timeout=20_000)
        page.evaluate("document.activeElement?.blur()")  # no ring of focus
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        top, bottom = (
            page.locator(element).evaluate(
                f"element => element.getBoundingClientRect().{edge} + window.scrollY"
            )
            for element, edge in ((first, "top"), (last, "bottom"))
        )
        picture = page.screenshot(
            full_page=True,
            animations="disabled",
            clip={
                "x": 0,
                "y": top - MARGIN,
                "width": WIDTH,
                "height": bottom - top + 2 * MARGIN,
            },
        )
        chromium.close()
    if errors:
        raise RuntimeError(f"a script of the page failed: {errors[0]}")
    return picture


def compressed(picture: bytes) -> bytes:
    """The same picture with a palette."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    out = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def main() -> int:
    """Reads the arguments, writes the picture, says how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", nargs="?", type=Path, default=ROOT / "results/llama-stdlib.html")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs/assets/diagnosis.png")
    parser.add_argument("--first", default="#heads .heading", help="CSS selector of the top")
    parser.add_argument("--last", default="#head-map", help="CSS selector of the bottom")
    parser.add_argument(
        "--head",
        default="model.layers.6.self_attn/1",
        help="the head that is selected, as in the page's address; empty for none",
    )
    arguments = parser.parse_args()
    if not arguments.page.is_file():
        print(f"{arguments.page}: no such page; `make demo` writes it", file=sys.stderr)
        return 2
    picture = compressed(
        photograph(arguments.page.resolve(), arguments.first, arguments.last, arguments.head)
    )
    if len(picture) > LIMIT:
        print(f"{len(picture):,} bytes are more than {LIMIT:,}", file=sys.stderr)
        return 1
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(picture)
    size = Image.open(arguments.out).size
    print(f"wrote {arguments.out}: {size[0]} x {size[1]} pixels, {len(picture):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
