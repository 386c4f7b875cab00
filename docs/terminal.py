"""Draw ``show.svg``: what two ``jaxmask show`` print in a terminal, one after the other.

python docs/terminal.py
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html import escape
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.segment import Segment
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COMMANDS = (
    'jaxmask show "causal & sliding_window(3)" --query 6 --key 8',
    'jaxmask show "causal & sliding_window(1024)" --query 8192 --block 512',
)
COLUMNS, CELL, LINE, MARGIN = 72, 8, 18, 16
# Black, red, green, yellow, blue, magenta, cyan and white.
_GREY, _COLOURS = (
    (139, 148, 158),
    [
        *((72, 79, 88), (255, 123, 114), (63, 185, 80), (227, 160, 60)),
        *((88, 166, 255), (188, 140, 255), (86, 200, 230), (209, 215, 224)),
    ],
)
THEME = TerminalTheme((22, 27, 34), _COLOURS[-1], _COLOURS, [_GREY, *_COLOURS[1:]])
# When a line appears, in seconds: what is printed at once, and how long a person looks at it.
TYPED, LOOKED_AT = 0.6, 2.5
STYLE = """<style>
.line{opacity:0;animation:appear .01s forwards}
@keyframes appear{to{opacity:1}}
@media(prefers-reduced-motion:reduce){.line{opacity:1;animation:none}}
</style>"""


def printed(command: str) -> list[Text]:
    """The lines that a command prints, with their colours."""
    program = [sys.executable, "-c", "from jaxmask.cli import main; main()"]
    environment = os.environ | {"COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    environment |= {"COLORTERM": "truecolor", "PYTHONIOENCODING": "utf-8"}
    arguments = [*program, *shlex.split(command)[1:]]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout
    return [Text.from_ansi(line) for line in output.splitlines()]


def drawn(text: Text, y: float) -> Iterator[str]:
    """The parts of a line, each character in its own cell, whatever the font."""
    console, column = Console(file=StringIO(), width=COLUMNS, color_system="truecolor"), 0
    for segment in console.render(text):
        if segment == Segment.line():
            continue
        look = ""
        if style := segment.style:
            look += f' fill="{style.color.get_truecolor(THEME).hex}"' if style.color else ""
            look += ' opacity="0.6"' if style.dim else ""
            look += ' font-weight="700"' if style.bold else ""
        places = " ".join(str(MARGIN + CELL * (column + i)) for i in range(len(segment.text)))
        if segment.text.strip():
            yield f'<text x="{places}" y="{y:g}"{look} xml:space="preserve">{escape(segment.text)}</text>'
        column += len(segment.text)


def page() -> str:
    """The recording."""
    lines: list[tuple[float, Text]] = []
    at = 0.0
    for command in COMMANDS:
        lines.append((at, Text(f"$ {command}", "bold")))
        at += TYPED
        lines += [(at, line) for line in (*printed(command), Text(""))]
        at += LOOKED_AT
    lines.pop()
    body = "".join(
        f'<g class="line" style="animation-delay:{when:g}s">{"".join(drawn(text, MARGIN + LINE * (i + 0.75)))}</g>'
        for i, (when, text) in enumerate(lines)
    )
    width, height = 2 * MARGIN + COLUMNS * CELL, 2 * MARGIN + len(lines) * LINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" fill="#d1d7e0" '
        f'font-family="ui-monospace, monospace" font-size="13">{STYLE}'
        f'<rect width="{width}" height="{height}" rx="8" fill="#161b22"/>{body}</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_name("show.svg").write_text(page(), encoding="utf-8")
