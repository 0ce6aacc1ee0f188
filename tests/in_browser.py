"""Asks the demo's page in a browser, as a person does, and takes its picture.

    python tests/in_browser.py [PICTURE.png]

It is not part of the suite, as it needs a browser and its driver: `apt-get install chromium` and
`pip install playwright`. A class is chosen and the button pressed; the pictures that the page then
shows of teacher and student must be read as that class.
"""

import base64
import io
import os
import pathlib
import shutil
import sys
import tempfile

TESTS = pathlib.Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "jobs")]

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright
from test_demo import make_reader, make_studio

from lit_jax.jobs import demo

WANTED = 3
# The bytes of a picture of the page, in base64.
FETCH = """async (source) => {
    const bytes = new Uint8Array(await (await fetch(source)).arrayBuffer());
    return btoa(String.fromCharCode(...bytes));
}"""


def draw(address: str, chromium: str, picture: str | None) -> dict[str, np.ndarray]:
    """The images that the page shows of each model, (h, w, 3) uint8. `picture`: the page's."""
    images = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.goto(address, wait_until="domcontentloaded")
        page.locator("#wanted input").click()
        page.get_by_role("option", name=str(WANTED), exact=True).click()
        page.locator("#draw").click()
        for name in ("teacher", "student"):
            line = page.locator(f"#{name}_line textarea")
            page.wait_for_function(
                "line => line.value.includes('s an image')", arg=line.element_handle()
            )
            source = page.locator(f"#{name}_image img").get_attribute("src")
            content = base64.b64decode(page.evaluate(FETCH, source))
            images[name] = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        if picture:
            page.screenshot(path=picture)
        browser.close()
    return images


def main() -> int:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        print("no Chromium is on the PATH", file=sys.stderr)
        return 2
    picture = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SESSION_FILES"] = folder  # where tiny_dataset.py puts its records
        page = demo.make_page(make_studio(pathlib.Path(folder)))
        try:
            images = draw(demo.serve(page, "127.0.0.1", 0), chromium, picture)
        finally:
            page.close()
        read = make_reader(pathlib.Path(folder))
        digits = {name: read(image) for name, image in images.items()}
    print(f"asked for {WANTED}: {digits}")
    return int(set(digits.values()) != {WANTED})


if __name__ == "__main__":
    sys.exit(main())
