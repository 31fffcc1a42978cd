"""`make check-cluster`: the files of configs/cluster by the tools' own schemas, which the tests do not have.

python scripts/check_cluster.py SBATCH_MANUAL      with SkyPilot and Kubeflow Trainer's models installed
"""

from __future__ import annotations

import gzip
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
import sky
import yaml
from kubeflow_trainer_api import models

CLUSTER = Path(__file__).parent.parent / "configs" / "cluster"
KINDS = {"TrainJob": models.TrainerV1alpha1TrainJob, "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime}


def differences(written: Any, known: Any, place: str = "") -> Iterator[str]:
    """Where a document has more than the model that was read from it: models leave out keys that they do not know."""
    if isinstance(written, dict) and isinstance(known, dict):
        for key, value in written.items():
            yield from differences(value, known.get(key), f"{place}.{key}")
    elif isinstance(written, list) and isinstance(known, list) and len(written) == len(known):
        for number, (one, other) in enumerate(zip(written, known, strict=True)):
            yield from differences(one, other, f"{place}[{number}]")
    elif written != known:
        yield f"{place}: {written!r} is read as {known!r}"


def kubernetes(file: Path) -> list[str]:
    """What Kubeflow Trainer does not know in a file."""
    problems = []
    for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
        read = KINDS[document["kind"]].from_dict(document)
        problems += differences(document, read.to_dict(), document["kind"])
    return problems


def slurm(file: Path, manual: str) -> list[str]:
    """The options of a script that sbatch's manual does not have."""
    options = set(re.findall(r"\\-\\-([a-z]+(?:\\?-[a-z]+)*)", manual))
    known = {option.replace("\\", "") for option in options}
    used = re.findall(r"^#SBATCH --([\w-]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    return [f"sbatch has no --{name}" for name in used if name not in known]


def main(manual: Path) -> int:
    problems = {}
    for file in sorted(CLUSTER.glob("skypilot-*.yaml")):
        sky.Task.from_yaml(str(file))  # raises what is wrong
        problems[file.name] = []
    for file in sorted(CLUSTER.glob("kubeflow*.yaml")):
        problems[file.name] = kubernetes(file)
    text = gzip.decompress(manual.read_bytes()).decode("utf-8")
    for file in sorted(CLUSTER.glob("slurm-*.sh")):
        problems[file.name] = slurm(file, text)
    for name, lines in problems.items():
        print(f"{name}: {'; '.join(lines) or 'valid'}")
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
