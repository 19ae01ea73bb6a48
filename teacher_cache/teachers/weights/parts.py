"""Which part of a weights file is the teacher: one of its dictionaries, behind one prefix.

People have their weights in wrappers: under `model` or `state_dict_ema`, behind `module.` (DistributedDataParallel, averaged
models), `_orig_mod.` (torch.compile), `teacher.backbone.`, or several of these. One rule for all teachers:

    1. Where a teacher's published file keeps it (`Layout.inside`), with the published names, counts first.
    2. Else any one dictionary of the file, at any depth, behind any one prefix, in which every name that the model wants is
       there and all others are on the layout's ignore list; if the place of 1. is there, only there and within.
    3. Else, where none fits or several that differ, nothing is guessed: `--weights FILE#KEY` says which, KEY being the dotted
       path of the dictionary, going on into its names: `#state_dict_ema`, `#model.teacher.backbone`.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ...errors import BadInputError, UsageError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_DEPTH = 4
"""Dictionaries within dictionaries that are looked into."""

_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch puts into names where it wraps a module, which may be any of a model's: of no meaning anywhere."""
_COUNTERS = ("n_averaged",)
"""What torch's AveragedModel keeps beside the model."""
_TRANSFORMERS = re.compile(
    r"(?<!text\.transformer\.)(?<![^.])(?:embeddings\.(?:cls_token|patch_embedding|class_embedding)|vision_model\.|"
    r"(?:encoder\.)?layers?\.\d+\.(?:attention|self_attn|layernorm_)\b)"
)
"""Names that Hugging Face's transformers give to a ViT's parts."""


@dataclass(frozen=True)
class Layout:
    """How the names in a published file map to the model's own."""

    keep: tuple[tuple[str, str], ...] = (("", ""),)
    """(beginning in the file, beginning in the model) of names that belong to the model; the first pair that fits counts."""
    ignore: tuple[str, ...] = ()
    """Names that belong to something else, as shell patterns; looked at before `keep`."""
    require: tuple[str, ...] = ()
    """Names of something else that must be there: without them the file is another model's that has the same tower."""
    inside: tuple[str, ...] = ()
    """Entries of the file to go into first, one within the other, such as `("state_dict",)`; skipped where absent."""

    def enter(self, found: dict) -> dict:
        for entry in self.inside:
            inner = dict.get(found, entry)
            found = inner if isinstance(inner, dict) else found
        return found

    def own_name(self, name: str) -> str | None:
        """The model's name for a name in the file; None if it is not the model's."""
        return next((own + name.removeprefix(start) for start, own in self.keep if name.startswith(start)), None)

    def name_in_file(self, own_name: str) -> str:
        return next(start + own_name.removeprefix(own) for start, own in self.keep if own_name.startswith(own))

    def anywhere(self) -> Layout:
        """The same names in any dictionary, also where `module.` was taken off them."""

        def bare(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name.removeprefix("module.") for name in names)

        keep = tuple(dict.fromkeys((start.removeprefix("module."), own) for start, own in self.keep))
        return Layout(keep, bare(self.ignore) + _COUNTERS, bare(self.require))


@dataclass(frozen=True, eq=False)
class Part:
    """One dictionary of a file, seen through one layout and behind one prefix."""

    node: dict
    key: str
    """Its dotted path, going on into its names: what `#KEY` would be. Empty: the whole file."""
    prefix: str
    layout: Layout
    tensors: dict[str, object] = field(default_factory=dict)
    """The model's name -> what the file has for it."""
    names: dict[str, str] = field(default_factory=dict)
    """The model's name -> the name in the file."""
    ignored: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    """Names that nobody knows."""
    beside: list[str] = field(default_factory=list)
    """The same, of those that lack the prefix."""
    absent: list[str] = field(default_factory=list)
    """Names of Layout.require that are not there."""

    def name_in_file(self, own_name: str) -> str:
        return self.names.get(own_name) or self.prefix + self.layout.name_in_file(own_name)

    def misfits(self, own: dict[str, Tensor]) -> dict[str, list[str]]:
        """What keeps this from being the model with the state dict `own`: kind of fault -> names in the file; empty: it fits."""
        tensors = self.tensors
        shared = own.keys() & tensors.keys()
        shapes = {name: tuple(getattr(tensors[name], "shape", ())) for name in shared}
        in_file = self.name_in_file
        found = {
            "missing": [in_file(name) for name in own.keys() - tensors.keys()] + self.absent,
            "unexpected": self.foreign + self.beside + [in_file(name) for name in tensors.keys() - own.keys()],
            "of another shape": [
                f"{in_file(n)}: {shapes[n]} instead of {tuple(own[n].shape)}" for n in shared if shapes[n] != own[n].shape
            ],
            "not floating point": [in_file(name) for name in shared if not _is_plain_float(tensors[name])],
        }
        return {fault: names for fault, names in found.items() if names}

    def fits_alone(self, own: dict[str, Tensor]) -> bool:
        """Whether it would fit if only names with its prefix were there."""
        return not replace(self, beside=[]).misfits(own)

    def equals(self, other: Part) -> bool:
        """Whether both give the same numbers."""
        if self.tensors.keys() != other.tensors.keys():
            return False
        pairs = [(tensor, other.tensors[name]) for name, tensor in self.tensors.items()]
        return all(a is b for a, b in pairs) or all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def split_key(weights: str) -> tuple[Path, str | None]:
    """PATH and KEY of `PATH#KEY`, None without one. A file that has that very name is it, whatever is in its name."""
    if not Path(weights).exists():
        for place in (i for i in reversed(range(len(weights))) if weights[i] == "#"):
            if Path(weights[:place]).is_file():
                return Path(weights[:place]), weights[place + 1 :]
    return Path(weights), None


def choose(found: dict, key: str | None, layouts: Sequence[Layout], own: dict[str, Tensor], given: str, expected: str) -> Part:
    """The part of a file, or of its part at `key`, that is the model with the state dict `own`, by the rule above.

    given:    `--weights` as it was given, for errors
    expected: a sentence that says which file to give instead
    Raises BadInputError if nothing fits, UsageError if there is no such key or several different parts fit.
    """
    if key is not None:
        found = _at_key(found, key, given)
    published = _as_published(found, layouts)
    if not published.misfits(own):
        return published

    parts = list(_parts(found, layouts, own))
    fitting = [part for part in parts if not part.misfits(own)]
    place = next((node for layout in layouts if (node := layout.enter(found)) is not found), found)
    within = [id(node) for _, node in _dictionaries(place)]  # a student beside a teacher that does not fit is no teacher
    fitting = [part for part in fitting if id(part.node) in within]
    fitting = [part for part in fitting if part.node is place] or fitting
    different = _different(fitting)
    if len(different) == 1:
        return different[0]

    choices = _different(part for part in parts if part.key and part.fits_alone(own))
    file = given.removesuffix(f"#{key}") if key is not None else given
    options = " or ".join(f"--weights {file}#{'.'.join(filter(None, (key, part.key)))}" for part in choices)
    if different:
        raise UsageError(f"--weights {given} holds {len(different)} different sets of weights that fit. Choose: {options}.")
    near = [published, *(part for part in parts if id(part.node) in within)]
    closest = min(near, key=lambda part: _n_unfilled(part, own))
    faults = "; ".join(listed(fault, names) for fault, names in closest.misfits(own).items())
    hint = ""
    if choices:
        hint = f"To take a part of it alone: {options}. "
    elif foreign := next((name for name in map(str, dict.keys(closest.node)) if _TRANSFORMERS.search(name)), None):
        known = ", ".join(sorted(map(layouts[0].name_in_file, own))[:2])
        hint = (
            f"It has the layout of Hugging Face's transformers ({foreign}), which is read of whole ViTs, DINOv2, DINOv3, CLIP "
            f"and SigLIP; other names must be like {known}, in one dictionary and behind one prefix at most. "
        )
    hint += _of_another_grid(closest, own)
    raise BadInputError(f"--weights {given} does not fit this teacher: {faults}. {hint}{expected}")


def listed(what: str, names: Iterable[str]) -> str:
    """`3 missing (a, b, c)`, the first few names."""
    names = sorted(names)
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} {what} ({shown})"


def _as_published(found: dict, layouts: Sequence[Layout]) -> Part:
    """Through the first layout that has names in the file, at its place; through the last if none has."""
    for layout in layouts:
        node = layout.enter(found)
        if any(layout.own_name(str(name)) is not None for name in dict.keys(node)):
            break
    return _part(node, "", "", layout, {str(name): str(name) for name in dict.keys(node)})


def _parts(found: dict, layouts: Sequence[Layout], own: dict[str, Tensor]) -> Iterator[Part]:
    """All parts that have most of the model's names."""
    layouts = list(dict.fromkeys(layout.anywhere() for layout in layouts))
    for path, node in _dictionaries(found):
        names: dict[str, str] = {}
        for name in map(str, dict.keys(node)):
            names.setdefault(_WRAPPER.sub("", name), name)
        for layout in layouts:
            wanted = {layout.name_in_file(name) for name in own}
            starts = Counter(start for name in names for start in _starts(name) if name.removeprefix(start) in wanted)
            for prefix in (start for start, n_names in starts.items() if 2 * n_names > len(wanted)):
                key = ".".join(filter(None, (path, prefix.removesuffix("."))))
                yield _part(node, key, prefix, layout, names)


def _part(node: dict, key: str, prefix: str, layout: Layout, names: dict[str, str]) -> Part:
    """names: of a dictionary, without wrappers -> as they are."""
    part = Part(node, key, prefix, layout, absent=[prefix + name for name in layout.require if prefix + name not in names])
    for name, in_file in names.items():
        is_behind, rest = name.startswith(prefix), name.removeprefix(prefix)
        own_name = layout.own_name(rest) if is_behind else None
        if any(fnmatch.fnmatchcase(rest, pattern) for pattern in layout.ignore):
            part.ignored.append(in_file)
        elif own_name is None or own_name in part.tensors:
            (part.foreign if is_behind else part.beside).append(in_file)
        else:
            part.tensors[own_name], part.names[own_name] = _value(node, in_file), in_file
    twice = {str(name) for name in dict.keys(node)} - set(names.values())  # with and without a wrapper
    part.foreign.extend(twice)
    return part


def _dictionaries(found: dict, path: str = "", depth: int = 0, seen: set[int] | None = None) -> Iterator[tuple[str, dict]]:
    """(dotted path, dictionary) of all that hold tensors, outermost first; each once, however often it is held."""
    seen = set() if seen is None else seen
    seen.add(id(found))
    if any(isinstance(value, Tensor) for value in dict.values(found)):
        yield path, found
    for name, value in dict.items(found):
        if isinstance(value, dict) and isinstance(name, str) and depth < MOST_DEPTH and id(value) not in seen:
            yield from _dictionaries(value, f"{path}.{name}" if path else name, depth + 1, seen)


def _at_key(found: dict, key: str, given: str) -> dict:
    """The dictionary at a dotted path: entries that are dictionaries, then the beginning of names, which is taken off them."""
    part = _descend(found, key) if key else None
    if part is None:
        known = sorted({start for path, node in _dictionaries(found) for start in _keys(path, node)})
        raise UsageError(f"--weights {given}: the file has no part {key!r} that holds tensors. It has: "
                         f"{', '.join(known[:12]) + (', ...' if len(known) > 12 else '') or 'none'}.")  # fmt: skip
    return part


def _keys(path: str, node: dict) -> Iterator[str]:
    """Of a dictionary: its own path and the first beginnings of its names."""
    if path:
        yield path
    for name in map(str, dict.keys(node)):
        start, dot, _ = name.partition(".")
        if dot:
            yield f"{path}.{start}" if path else start


def _descend(found: dict, key: str) -> dict | None:
    inner = dict.get(found, key)
    if isinstance(inner, dict):
        return inner
    for place in (i for i in range(len(key)) if key[i] == "."):
        inner = dict.get(found, key[:place])
        if isinstance(inner, dict) and (part := _descend(inner, key[place + 1 :])) is not None:
            return part
    names = {_WRAPPER.sub("", str(name)): value for name, value in dict.items(found)}
    return {name.removeprefix(f"{key}."): value for name, value in names.items() if name.startswith(f"{key}.")} or None


def _different(parts: Iterable[Part]) -> list[Part]:
    kept: list[Part] = []
    for part in parts:
        if not any(part.equals(other) for other in kept):
            kept.append(part)
    return kept


def _starts(name: str) -> Iterator[str]:
    """All beginnings of a dotted name that end with a dot, the empty one included."""
    yield ""
    yield from (name[: i + 1] for i in range(len(name)) if name[i] == ".")


def _of_another_grid(part: Part, own: dict[str, Tensor]) -> str:
    """A sentence where the position table is that of another input size, else nothing."""
    for name in ("pos_embed", "positional_embedding"):
        shapes = [tuple(getattr(state.get(name), "shape", ())) for state in (part.tensors, own)]
        if len({shape[-1:] for shape in shapes}) == 1 and len({len(shape) for shape in shapes}) == 1 and shapes[0] != shapes[1]:
            rows = [shape[-2] for shape in shapes]
            return (f"Its position table has {rows[0]:,} rows and this model's {rows[1]:,}: the file is of another input size; "
                    "--image-size changes the size after loading, and needs the file of this model's own. ")  # fmt: skip
    return ""


def _n_unfilled(part: Part, own: dict[str, Tensor]) -> int:
    misfits = part.misfits(own)
    return sum(len(misfits.get(fault, ())) for fault in ("missing", "of another shape", "not floating point"))


def _value(node: dict, name: str):
    """By a name that is text here and may be a number there."""
    return dict.get(node, name) if name in dict.keys(node) else next(v for key, v in dict.items(node) if str(key) == name)


def _is_plain_float(value) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.dtype in FLOATS
