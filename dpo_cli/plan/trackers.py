"""Where else the figures go (`report_to`): what a tracker needs before a training starts. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from dpo_cli.config.options import Config
from dpo_cli.errors import Problem

LOGIN_FIX = 'log in with `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline; or write "report_to": "none"'


def problems(config: Config) -> Iterator[Problem]:
    """What the trackers of a config lack on this machine."""
    names = [config.report_to] if isinstance(config.report_to, str) else config.report_to
    for name in names:
        if name == "none":
            continue
        if not _installed(name):
            message = f"report_to needs the package {name}, which is not installed"
            fix = f'install it: pip install {name}; or write "report_to": "none"'
            yield Problem("warning", "tracker-missing", message, fix, "report_to", stops_training=True)
        elif name == "wandb" and (lack := _wandb_lacks()):
            yield Problem("warning", "wandb-login", lack, LOGIN_FIX, "report_to", stops_training=True)


def _installed(package: str) -> bool:
    """A folder of that name is no package: wandb leaves one wherever it runs."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _wandb_lacks() -> str | None:
    """What is wrong with wandb's credentials, as wandb itself finds them; without them it asks on the terminal, or fails."""
    import wandb

    if wandb.setup().settings.mode in ("offline", "disabled"):
        return None
    try:
        found = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        return f"wandb cannot log in: {error}"
    return None if found else "wandb has no API key on this machine"
