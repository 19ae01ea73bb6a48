"""What is not installed: which extra of the package brings it, in one sentence."""

from __future__ import annotations

import click

PACKAGE = "teacher-cache"
BROUGHT_BY = {
    **dict.fromkeys(("ffcv", "llvmlite", "numba", "safetensors", "setuptools", "timm", "torch"), ("train", "teachers")),
    **dict.fromkeys(("huggingface_hub", "open_clip", "torchvision"), ("teachers",)),
    **{name: (name, "log") for name in ("tensorboard", "wandb", "mlflow")},
    **dict.fromkeys(("jinja2", "markupsafe", "matplotlib"), ("pages",)),
    "sklearn": ("pages", "evals"),
    "torchmetrics": ("evals",),
    "ray": ("ray",),
    "mlxtend": ("demo",),
}
"""Module -> the extras that bring it (setup.cfg)."""
TAKEN_BY = {
    **dict.fromkeys(("estimate", "extract", "verify"), ("teachers",)),
    **dict.fromkeys(("report", "show"), ("pages", "train")),
    **dict.fromkeys(("logreg", "segment"), ("evals", "train")),
}
"""Command -> the extras to name where any of what they bring is missing, so that nobody installs one after the other."""


def extras_for(module: str, command: str | None = None) -> tuple[str, ...]:
    """The extras to install where `module` is missing, and with it all that `command` takes; () if no extra brings it."""
    brought_by = BROUGHT_BY.get(module.partition(".")[0])
    if brought_by is None:
        return ()
    taken = TAKEN_BY.get(command or "", ())
    return tuple(sorted(taken if set(taken) & set(brought_by) else {*taken, brought_by[0]}))


def install_command(extras: tuple[str, ...]) -> str:
    """`pip install 'teacher-cache[train]'`."""
    return f"pip install '{PACKAGE}[{','.join(extras)}]'"


def what_is_missing(error: ModuleNotFoundError) -> str | None:
    """What the command that is running needs and does not find, and what installs it; None if no extra brings it."""
    context = click.get_current_context(silent=True)
    extras = extras_for(error.name or "", context and context.command.name)
    if not extras:
        return None
    who = context.command_path if context else PACKAGE
    return f"{who} needs {(error.name or '').partition('.')[0]}, which is not installed: {install_command(extras)}"
