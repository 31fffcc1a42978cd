"""A picture of a report, as a browser shows it: the top of a run's report.html, as PNG."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from browser import CHROMIUM, browser

WIDTH, HEIGHT = 1100, 1300  # some 190 KB


def main() -> None:
    page, picture = map(Path, sys.argv[1:])
    if CHROMIUM is None:
        raise SystemExit("chromium is not installed")
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as started:
        opened = started.page(Path(folder))
        opened.look(WIDTH, HEIGHT)
        opened.open(page.absolute().as_uri())
        picture.write_bytes(opened.picture())


if __name__ == "__main__":
    main()
