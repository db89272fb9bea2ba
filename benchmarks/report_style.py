"""The colours of charts and pages, light and dark, and what makes an SVG follow them."""

from __future__ import annotations

import re
import zlib

from report_data import OUR_OWN
from results import OURS

# Name: (light, dark). Okabe and Ito's, which any colour blindness tells apart, made legible.
INKS = {
    "paper": ("#ffffff", "#14181d"),
    "ink": ("#1b2026", "#e6e9ed"),
    "muted": ("#5c6671", "#9aa4af"),
    "grid": ("#d9dee4", "#2f363e"),
    "blue": ("#0067a8", "#4db2ec"),
    "orange": ("#d98200", "#f0a53a"),
    "green": ("#00835f", "#3fc79d"),
    "red": ("#c44e00", "#ff8a4a"),
    "purple": ("#a8558a", "#dd9cc4"),
    "sky": ("#3d93c4", "#85c9f0"),
    "grey": ("#7a858f", "#8f9aa5"),
}
# By what a name begins with; ours stand out.
COLOURS = (
    (f"{OURS},", "sky"),
    (OURS, "blue"),
    ("eager, in place", "sky"),
    ("eager", "grey"),
    ("reference", "grey"),
    ("torch.randn", "grey"),
    ("torch.compile", "orange"),
    ("diffusers", "green"),
    ("lucidrains", "purple"),
    ("OpenAI", "red"),
    ("a batch", "grey"),
)
ROTATION = ("blue", "orange", "green", "red", "purple", "sky", "grey")
FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def light(name: str) -> str:
    return INKS[name][0]


def colour(name: str, index: int = 0) -> str:
    for beginning, ink in COLOURS:
        if name.startswith(beginning):
            return light(ink)
    return light("sky" if OUR_OWN.match(name) else ROTATION[index % len(ROTATION)])


def style() -> str:
    """The inks as CSS variables, for a page or a file of its own."""
    both = [" ".join(f"--{name}:{pair[i]};" for name, pair in INKS.items()) for i in (0, 1)]
    return f":root{{{both[0]}}}@media (prefers-color-scheme:dark){{:root{{{both[1]}}}}}"


def themed(text: str, mark: str, description: str) -> str:
    """Without what a browser does not need, its ids its own, its colours variables."""
    own = f"c{zlib.crc32(f'{mark} {description}'.encode()):08x}"  # several stand in one page
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    used = set(re.findall(r"(?:#)([\w.-]+)(?=[\")])", text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{own}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(xlink:href=\"|url\()#", rf"\1#{own}-", text)
    for name, (shade, _) in INKS.items():
        text = text.replace(shade, f"var(--{name})")
    text = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", rf"font: \1{FONT}", text)
    text = re.sub(r"\n\s*", "\n", text)
    head = text.index(">") + 1
    opening = text[:head].replace("<svg", f'<svg role="img" data-chart="{mark}"')
    title = f"<title>{escaped(description)}</title>"
    return f"{opening}\n{title}\n<style>{style()}</style>{text[head:]}"


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
