"""The colours of pages and pictures, once: CSS variables of the template, and numbers for matplotlib."""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff", "raised": "#f4f6f7", "ink": "#1b2227", "muted": "#56626b", "rule": "#d5dbdf",
    "accent": "#1d6a8c", "second": "#a8520c", "good": "#25754a", "warn": "#8f5a00", "bad": "#b02a37",
}  # fmt: skip
DARK = {
    "paper": "#14191d", "raised": "#1d2429", "ink": "#e7ebee", "muted": "#a0acb5", "rule": "#39444c",
    "accent": "#6cb9dc", "second": "#eda05c", "good": "#6ec597", "warn": "#e3b45c", "bad": "#f0868f",
}  # fmt: skip
"""Text colours (ink, muted, accent, second, good, warn, bad) have a contrast of at least 4.5 on paper and raised (WCAG AA)."""

CLASSES_LIGHT = ["#2f6fa8", "#c2601a", "#2b855b", "#b8344c", "#7656a5", "#86673a", "#bd4b96", "#5c6870", "#7d8118", "#148794"]
CLASSES_DARK = ["#74b0e4", "#f0985a", "#63c295", "#ec7a8b", "#b394e0", "#c9a670", "#ea8fca", "#a3b0ba", "#c6cb5a", "#56cfdc"]
"""One a class. From the eleventh on they come again, with another shape."""

THEMES = {
    "light": LIGHT | {f"class-{i}": colour for i, colour in enumerate(CLASSES_LIGHT)},
    "dark": DARK | {f"class-{i}": colour for i, colour in enumerate(CLASSES_DARK)},
}
