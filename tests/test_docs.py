"""The documentation: its commands, configs, rows and links are real, its reference is fresh, and its site needs no network.

In docs/ the language of a fence says what is checked:

    json     a config, or the options of one that the page speaks of: checked like `dpo validate --no-data`
    jsonl    rows of a dataset: read, without an error
    console  lines after "$ " are commands: each exists, with its options; the rest is output
    text     anything else

A console fence after the line `<!-- run -->` is run too: all those of a page, in order, in one folder with a tiny model in
place of its models, and with the files that the page shows under a title. `<!-- run: exit 3 -->` names the exit code.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import markdown
import pytest
import typer
import yaml
from browser import CHROMIUM, browser
from conftest import ROOT, made_row
from fork_server import dpo

from dpo_cli.app import app
from dpo_cli.config.config import load_stages
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.preflight import inspect

sys.path.insert(0, str(ROOT / "scripts"))
import reference_pages

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
IDS = [str(page.relative_to(DOCS)) for page in PAGES]
FENCE = re.compile(
    r"^ *(?:<!-- (?P<runs>run)(?:: exit (?P<exit>\d+))? -->\n+ *)?"
    r"```(?P<language>\w+)(?P<info>[^\n]*)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
# What a tiny training takes in place of the values on a page.
TINY = (
    "model_name=model",
    "device=cpu",
    "bf16=false",
    "fp16=false",
    "use_4bit=false",
    "use_8bit=false",
    "max_steps=2",
    "lora_r=4",
)
TINY += ("kl_prompts=2", "max_new_tokens=4", "eval_split=0.4", "target_modules=all-linear", "provider=huggingface")
TAKES_VALUES = ("validate", "train", "augment")
# What a page may name in addition to dpo.
OTHER = ("pip", "uv", "python3", "py", "source", ".venv/Scripts/Activate.ps1", "cd", "ollama", "tensorboard")
OTHER += ("torchrun", "accelerate", "sbatch")


@dataclass(frozen=True)
class Fence:
    """A block of code on a page."""

    language: str
    text: str
    title: str
    runs: bool
    exit_code: int

    @property
    def commands(self) -> list[str]:
        """The lines after "$ ", each with its continuations."""
        joined = re.sub(r" \\\n> ?", " ", self.text)
        return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


def fences(page: Path) -> Iterator[Fence]:
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        title = re.search(r'title="([^"]+)"', match["info"])
        text = textwrap.dedent(match["text"])
        yield Fence(match["language"], text, title[1] if title else "", match["runs"] is not None, int(match["exit"] or 0))


def all_fences(language: str) -> list[Any]:
    named = [(f"{name}-{i}", fence) for name, page in zip(IDS, PAGES, strict=True) for i, fence in enumerate(fences(page))]
    return [pytest.param(fence, id=name) for name, fence in named if fence.language == language]


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def files(part: Any) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        for child in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from files(child)

    assert sorted(files(config["nav"])) == IDS


def test_every_fence_says_what_it_is() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(list(fences(page))), f"{page}: a fence has no language"
        assert {fence.language for fence in fences(page)} <= {"json", "jsonl", "console", "text", "python", "yaml", "shell"}


@pytest.mark.parametrize("fence", all_fences("json"))
def test_configs_are_valid(fence: Fence, tmp_path: Path) -> None:
    """A fragment gets a dataset: what it leaves out is not what its page speaks of."""
    file = tmp_path / "config.json"
    file.write_text(fence.text, encoding="utf-8")
    needs_data = '"dataset"' not in fence.text
    for loaded in load_stages(str(file), ["dataset=pairs.jsonl"] if needs_data else []):
        problems = inspect(loaded.draft() if loaded.foundation else loaded, probe(), with_data=False, with_fit=False).problems
        wrong = [
            problem for problem in problems if problem.severity == "error" and problem.code not in ("no-model", "model-missing")
        ]
        assert not wrong, wrong


@pytest.mark.parametrize("fence", all_fences("jsonl"))
def test_rows_can_be_read(fence: Fence, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(fence.text, encoding="utf-8")
    (tmp_path / "config.json").write_text('{"dataset": "rows.jsonl"}', encoding="utf-8")
    strategies = ("dpo", "sft") if "chosen" not in fence.text else ("dpo",)
    said = [dpo("validate", "config.json", f"strategy={name}", "--json", cwd=tmp_path) for name in strategies]
    problems = [
        [p for p in json.loads(one.stdout)["problems"] if p["code"].startswith("row-") and p["severity"] == "error"]
        for one in said
    ]
    assert not min(problems, key=len)


def parsed(words: list[str]) -> None:
    """Let Typer parse a command line of dpo, without running it."""
    group: Any = typer.main.get_command(app)
    if words and words[0] not in ("--version", "--help"):
        assert words[0] in group.commands, f"there is no command {words[0]}"
        if "--help" not in words:
            group.commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize("fence", all_fences("console"))
def test_commands_exist(fence: Fence) -> None:
    assert fence.commands, "a console fence without a command"
    for command in fence.commands:
        words = [*takewhile(lambda word: word != "|", shlex.split(command, comments=True))]
        while re.match(r"[A-Z_]+=", words[0]):  # a variable before the command
            words.pop(0)
        if Path(words[0]).name == "dpo":
            parsed(words[1:])
        elif words[0] == "make":
            targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert words[1] in targets, f"make has no target {words[1]}"
        else:
            assert words[0] in OTHER or (ROOT / words[0]).exists(), words[0]


RUN = [pytest.param(page, id=name) for name, page in zip(IDS, PAGES, strict=True) if any(f.runs for f in fences(page))]


@pytest.fixture
def scratch(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A folder as a reader has it: data, and a model that is tiny."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "my-pairs.jsonl").write_text("".join(json.dumps(made_row(i)) + "\n" for i in range(24)), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("\n".join(f"question {i}" for i in range(4)), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("page", RUN)
def test_commands_run(page: Path, scratch: Path) -> None:
    for fence in fences(page):
        if fence.title and "/" not in fence.title and not (scratch / fence.title).exists():
            text = re.sub(r'("model_name": )"(?!runs/)[^"]+"', r'\1"model"', fence.text)
            (scratch / fence.title).write_text(text, encoding="utf-8")
    for fence in fences(page):
        for command in fence.commands if fence.runs else ():
            words = shlex.split(command, comments=True)
            assert words.pop(0) == "dpo"
            named = {word.partition("=")[0] for word in words}
            takes_values = words[0] in TAKES_VALUES and "--from-logs" not in words
            words += [word for word in TINY if takes_values and word.partition("=")[0] not in named]
            done = dpo(*words, cwd=scratch)
            assert done.returncode == fence.exit_code, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"


def test_the_reference_is_fresh() -> None:
    for path, text in reference_pages.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make reference`"


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as the site makes them."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r'^--8<-- "(.+)"$', text, re.MULTILINE):
        text += (ROOT / name).read_text(encoding="utf-8")
    rendered = markdown.markdown(text, extensions=["toc", "attr_list", "fenced_code", "tables"])
    return set(re.findall(r'id="([^"]+)"', rendered))


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        address = urlsplit(link)
        if address.scheme:
            assert address.scheme == "https", link
            continue
        target = (page.parent / unquote(address.path)).resolve() if address.path else page
        assert target.is_file() and target.is_relative_to(DOCS), f"{link} leads nowhere"
        assert not address.fragment or address.fragment in anchors(target), f"{link}: no such heading"


def test_the_new_readme_is_short_and_its_commands_exist() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    for fence in fences(readme):
        if fence.language == "console":
            test_commands_exist(fence)
    assert not [
        link for link in LINK.findall(text) if not urlsplit(link).scheme and not (ROOT / link.partition("#")[0]).exists()
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install 'dpo-cli[docs]'")
    place = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


class _Addresses(HTMLParser):
    """What a page loads, and where it leads."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids.add(values.get("id", ""))
        if tag in ("script", "img", "iframe", "source") and "src" in values:
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(values["href"])
        if tag == "a":
            self.links.append(values.get("href", ""))


def test_the_site_loads_its_own_files_and_its_links_hold(site: Path) -> None:
    parsers: dict[Path, _Addresses] = {}
    for file in site.rglob("*.html"):
        parsers[file] = _Addresses()
        parsers[file].feed(file.read_text(encoding="utf-8"))
    assert len(parsers) > len(PAGES)
    for file, parser in parsers.items():
        if file.name == "404.html":  # is served for addresses of any depth
            continue
        for address in parser.loaded:
            assert not urlsplit(address).scheme and not urlsplit(address).netloc, f"{file.name} loads {address}"
            assert (file.parent / urlsplit(address).path).exists(), address
        for link in parser.links:
            address = urlsplit(link)
            if address.scheme or not (address.path or address.fragment):
                continue
            target = (file.parent / unquote(address.path)).resolve() if address.path else file
            assert target.exists(), f"{file}: {link}"
            if address.fragment and target in parsers and address.fragment != "__top":
                assert unquote(address.fragment) in parsers[target].ids, f"{file}: {link}"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_site_in_a_browser(site: Path, tmp_path: Path) -> None:
    """No page scrolls sideways on a desktop or a phone, none asks another host, and the search finds beta."""
    with browser(tmp_path) as opened:
        page = opened.page(tmp_path)
        for width in (1280, 390):
            page.look(width, 800)
            for file in sorted(site.rglob("*.html")):
                page.open(file.as_uri())
                wide = page.js("document.scrollingElement.scrollWidth")
                assert wide <= width, f"{file.relative_to(site)} is {wide} wide at {width}"
        page.look(1280, 800)
        page.open((site / "index.html").as_uri() + "?q=beta")
        titles = page.js(
            "new Promise(done => { const start = Date.now(); const look = () => {"
            " const found = [...document.querySelectorAll('.md-search-result__item h1, .md-search-result__item h2')];"
            " if (found.length || Date.now() - start > 15000) done(found.map(each => each.innerText));"
            " else setTimeout(look, 100); }; look(); })"
        )
        assert any("beta" in title.lower() for title in titles), titles
        assert not [url for url in page.requests if urlsplit(url).scheme not in ("file", "data", "blob", "about")]
