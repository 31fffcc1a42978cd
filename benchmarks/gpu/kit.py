"""The wheels that a CUDA machine lacks, gathered here and installed there into a scratch folder. Needs only Python and pip.

python benchmarks/gpu/kit.py gather            fills .kit (`make gpu-kit`); packages.txt says what the machine has
python benchmarks/gpu/kit.py run [WORD ...]    installs .kit and runs `python benchmarks/gpu WORD ...` (`make gpu`)

What is lacking follows from metadata: the requirements of dpo and of the checks, then those of each wheel, and of each package
that the machine has, in the release that is installed here.
.kit/any has wheels for every Python, .kit/3.11 and .kit/3.12 those of one. Of bitsandbytes only the library of one CUDA is
kept. A package that the machine has is printed with its version, and never replaced.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution, distributions, version
from pathlib import Path
from typing import Any

from pip._vendor.packaging.markers import default_environment
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / ".kit"
HAS = Path(__file__).with_name("packages.txt")
PYTHONS = ("3.11", "3.12")
PLATFORMS = [f"manylinux_2_{glibc}_x86_64" for glibc in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
BESIDES = ("liger-kernel", "pytest", "hypothesis")  # what the checks import, and dpo does not need
CUDA = "130"  # the library of bitsandbytes that torch 2.11 for CUDA 13.0 asks for
OTHER_LIBRARY = re.compile(rf"bitsandbytes/libbitsandbytes_(?!cpu\.so|cuda{CUDA}\.so)\w+\.so")
MOST_MB = 45


def gather() -> int:
    """Fill the kit; 1 if it is too large."""
    shutil.rmtree(KIT, ignore_errors=True)
    wheels = {python: _closure(python) for python in PYTHONS}
    for python, by_name in wheels.items():
        for wheel in by_name.values():
            # The folder of a wheel that another Python has too: pure ones, and those of the stable ABI.
            is_common = all(wheel.name in {other.name for other in others.values()} for others in wheels.values())
            folder = KIT / ("any" if is_common else python)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / wheel.name).exists():
                shutil.copy2(wheel, folder)
    sizes = {file: file.stat().st_size / 1e6 for file in sorted(KIT.rglob("*.whl"))}
    for file, size in sizes.items():
        print(f"{size:6.2f} MB  {file.relative_to(KIT)}")
    print(f"{sum(sizes.values()):6.2f} MB in {len(sizes)} wheels")
    return int(sum(sizes.values()) > MOST_MB)


def _closure(python: str) -> dict[str, Path]:
    """The wheels for this Python that are lacking, by the name of the package."""
    there, pins = dict(_versions(HAS)), dict(_versions(ROOT / "constraints.txt"))
    project = _project()
    liger = project["optional-dependencies"]["liger"]
    waiting = [Requirement(text) for text in (*project["dependencies"], *liger, *BESIDES)]
    place, wheels, followed = Path(tempfile.mkdtemp(prefix="kit-")), dict[str, Path](), set[str]()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in there:
            known = there[name]
            if known and not requirement.specifier.contains(known, prereleases=True):
                raise SystemExit(f"the machine has {name} {known}, and {requirement} is required")
            if name not in followed:  # its release there may need what the tested one needs
                followed.add(name)
                waiting += _installed_requirements(name, python)
            continue
        if name in wheels and not requirement.extras:
            continue
        wanted = f"{name}=={pins[name]}" if pins.get(name) else f"{name}{requirement.specifier}"
        wheels[name] = _downloaded(wanted, python, place)
        waiting += _requirements(wheels[name], python, requirement.extras)
    return wheels


def _project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def _versions(file: Path) -> Iterator[tuple[str, str]]:
    """The packages that a file of requirements names, each with its version, which is empty if it names none."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, number = line.partition("==")
            yield canonicalize_name(name), number


def _downloaded(wanted: str, python: str, place: Path) -> Path:
    """The wheel of this requirement for that Python on x86-64 Linux."""
    folder = Path(tempfile.mkdtemp(dir=place))
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "-d", str(folder)]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, wanted], check=True)
    (wheel,) = folder.glob("*.whl")
    if wheel.name.startswith("bitsandbytes-"):
        _without(wheel, OTHER_LIBRARY)
    return wheel


def _requirements(wheel: Path, python: str, extras: Iterable[str]) -> list[Requirement]:
    """What a wheel requires on that Python."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    return _applying(lines, python, extras)


def _installed_requirements(name: str, python: str) -> list[Requirement]:
    """What the release of a package requires that is installed here; nothing if it is not."""
    try:
        return _applying(distribution(name).requires or [], python, ())
    except PackageNotFoundError:
        return []


def _applying(lines: Iterable[str], python: str, extras: Iterable[str]) -> list[Requirement]:
    """The requirements that apply on Linux with that Python."""
    of_machine = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    of_machine |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    environments = [{**of_machine, "extra": extra} for extra in ("", *extras)]
    parsed = [Requirement(line) for line in lines]
    return [one for one in parsed if one.marker is None or any(one.marker.evaluate(each) for each in environments)]


def _without(wheel: Path, dropped: re.Pattern[str]) -> None:
    """Remove the files with these names from a wheel, and from its RECORD, which pip reads."""
    with zipfile.ZipFile(wheel) as old:
        kept = [name for name in old.namelist() if not dropped.fullmatch(name)]
        (record,) = (name for name in kept if re.fullmatch(r"[^/]+\.dist-info/RECORD", name))
        lines = [row for row in csv.reader(io.StringIO(old.read(record).decode())) if row and row[0] in kept]
        for name, digest, _ in lines:  # a wheel whose record is not that of its files is not the published one
            found = base64.urlsafe_b64encode(hashlib.sha256(old.read(name)).digest()).decode().rstrip("=")
            if name != record and digest != f"sha256={found}":
                raise SystemExit(f"{wheel.name}: {name} is not what RECORD says")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        smaller = wheel.with_suffix(".smaller")
        with zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
            for name in kept:
                new.writestr(old.getinfo(name), text.getvalue() if name == record else old.read(name), zipfile.ZIP_DEFLATED)
    smaller.replace(wheel)


def missing(kit: Path) -> list[Path]:
    """The wheels of the kit for this Python whose package is not installed; those that are installed are printed."""
    folders = (kit / "any", kit / f"{sys.version_info.major}.{sys.version_info.minor}")
    wheels = []
    for wheel in sorted(file for folder in folders for file in folder.glob("*.whl")):
        name, ours, *_ = parse_wheel_filename(wheel.name)
        try:
            print(f"{name} {version(name)} is there (the kit has {ours})", file=sys.stderr)
        except PackageNotFoundError:
            wheels.append(wheel)
    return wheels


def install(kit: Path, site: Path) -> None:
    """Install what is missing into the folder `site`, which nothing else uses."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    command += ["--no-compile", "--no-cache-dir", "--target", str(site)]
    if wheels := missing(kit):
        subprocess.run([*command, *map(str, wheels)], check=True)
    print(f"{len(wheels)} packages of the kit are installed in {site}", file=sys.stderr)


def unmet(site: Path) -> list[str]:
    """The requirements of the installed wheels that what is there does not meet: they are reported, and the checks run."""
    lines = []
    for one in distributions(path=[str(site)]):
        for requirement in map(Requirement, one.requires or []):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                there = version(requirement.name)
            except PackageNotFoundError:
                there = "nothing"
            if there == "nothing" or not requirement.specifier.contains(there, prereleases=True):
                lines.append(f"{one.metadata['Name']} asks for {requirement}, and {there} is there")
    return sorted(set(lines))


def lacking() -> list[str]:
    """The packages that dpo and the checks import, and that are not there. Without liger-kernel one check less runs."""
    project = _project()
    names = [Requirement(text).name for text in (*project["dependencies"], *BESIDES)]
    return [name for name in names if name != "liger-kernel" and not list(distributions(name=name))]


def run(words: list[str]) -> int:
    """Run the checks with the kit installed in a folder that is removed at the end; the exit code is theirs.

    2 if packages are lacking, which are printed.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-kit-") as place:
        site = Path(place)
        install(KIT, site)
        sys.path.append(place)
        print("".join(f"note: {line}\n" for line in unmet(site)), end="", file=sys.stderr)
        if names := lacking():
            print(
                f"{sys.executable} lacks {', '.join(names)}: install them, or name another with GPU_PYTHON=PATH",
                file=sys.stderr,
            )
            return 2
        paths = [str(ROOT), place, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        return subprocess.run([sys.executable, str(Path(__file__).parent), *words], env=environment, check=False).returncode


if __name__ == "__main__":
    if sys.argv[1:] == ["gather"]:
        sys.exit(gather())
    if sys.argv[1:2] == ["run"]:
        sys.exit(run(sys.argv[2:]))
    sys.exit(__doc__)
