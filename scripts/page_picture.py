"""A picture of a page of a run, as a browser shows it: the top of report.html or side-by-side.html, as PNG.

python scripts/page_picture.py PAGE PICTURE HEIGHT
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from browser import CHROMIUM, browser

WIDTH = 1100


def main() -> None:
    page, picture = map(Path, sys.argv[1:3])
    if CHROMIUM is None:
        raise SystemExit("chromium is not installed")
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as started:
        opened = started.page(Path(folder))
        opened.look(WIDTH, int(sys.argv[3]))
        opened.open(page.absolute().as_uri())
        picture.write_bytes(opened.picture())


if __name__ == "__main__":
    main()
