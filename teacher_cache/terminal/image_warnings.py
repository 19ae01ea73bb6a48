"""What Pillow warns of while it decodes images, counted by kind, with the name of an image: by itself it names none.

A command enters `named()` once, before it starts threads; whoever decodes says of which image, in its own thread, by `of_image`.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_thread = threading.local()


@contextmanager
def of_image(name: str) -> Iterator[None]:
    """What is warned of in this thread within the block is about the image `name`."""
    _thread.name = name
    try:
        yield
    finally:
        _thread.name = None


@contextmanager
def named(say: Callable[[str], None]) -> Iterator[None]:
    """Within the block warnings about images are collected, from all threads; at its end `say` is told a line for each kind.

    Other warnings go where they would go. Python's own filters are put back at the end.
    """
    found: dict[str, dict[str, str]] = {}  # kind -> image -> text
    lock = threading.Lock()
    with warnings.catch_warnings():  # not safe in threads, so once for all of them
        elsewhere = warnings.showwarning
        warnings.filterwarnings("always", module=r"PIL\.")

        def show(message, category, *where, **more) -> None:
            name = getattr(_thread, "name", None)
            if name is None:
                elsewhere(message, category, *where, **more)
                return
            text = " ".join(str(message).split())
            with lock:
                found.setdefault(f"{category.__name__} {re.sub('[0-9]+', 'N', text)}", {}).setdefault(name, text)

        warnings.showwarning = show
        try:
            yield
        finally:
            for images in found.values():
                name, text = min(images.items())
                others = f" ({len(images) - 1:,} more images with such a warning)" if len(images) > 1 else ""
                say(f"warning  {name}: {text.rstrip('. ')}.{others}")
