"""Masks from text, for the command line and for configuration files: ``causal & sliding_window(3)``."""

import ast
import operator
import re
import unicodedata
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import reduce

from jaxmask import checks
from jaxmask.mask import Empty, Full, Mask
from jaxmask.masks import (
    Causal,
    Chunked,
    Dense,
    Padding,
    PerHead,
    Predicate,
    Prefix,
    Segments,
    SlidingWindow,
    Window,
)

_MASKS: dict[str, type[Mask]] = {
    "full": Full,
    "empty": Empty,
    "causal": Causal,
    "sliding_window": SlidingWindow,
    "window": Window,
    "chunked": Chunked,
    "prefix": Prefix,
    "per_head": PerHead,
}
_BY_NAME = _MASKS | {kind.__name__: kind for kind in _MASKS.values()}
_NEEDS_PYTHON = {
    name for kind in (Padding, Segments, Dense, Predicate) for name in (kind.__name__, kind.__name__.lower())
}

# An error shows so many characters before its column, and after it, so that they fit one line of a terminal.
_BEFORE, _AFTER = 50, 25
# What reads a mask calls itself for each level, and Python does so a thousand times at most.
_MOST_LEVELS = 50


class MaskSyntaxError(ValueError):
    """The text does not describe a mask. The message shows the text, with a caret under what is wrong."""


def parse_mask(text: str) -> Mask:
    """The mask that ``text`` describes. The ``repr`` of a mask without arrays is such a text.

    Python's parser reads the text, which gives it Python's precedence and error messages. Nothing is evaluated, so the
    text may come from anywhere.

    Args:
        text: ``full``, ``empty``, ``causal``, ``sliding_window(size)``, ``window(left, right)``, ``chunked(size)``,
            ``chunked(size, start)``, ``prefix(length)``, ``per_head(mask, mask, …)``, or the names of their classes,
            combined by ``&``, ``|``, ``~`` and parentheses. Arguments are integers, and ``None`` for an unbounded side
            of a window.

    Raises:
        MaskSyntaxError: the text is anything else, or a mask refuses its arguments.
        TypeError: the text is not a str.

    >>> parse_mask("causal & ~sliding_window(3) | prefix(2)")
    Causal() & ~SlidingWindow(3) | Prefix(2)
    >>> parse_mask("casual")
    Traceback (most recent call last):
    jaxmask.parse.MaskSyntaxError: unknown mask 'casual'; did you mean 'causal'?
      casual
      ^
    """
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"text must be a str, got {checks.describe(text)}")
    # One line, in which a character keeps its column, so that line breaks and indentation mean nothing.
    reader = _Reader(re.sub(r"\s", " ", text).strip())
    try:
        return reader.read()
    except SyntaxError as error:
        # Where the text ends too early, there is no offset.
        column = error.offset - 1 if error.offset else len(reader.source)
        raise reader.error(column, error.msg) from None
    except (RecursionError, MemoryError):
        # Python's own parser, to which a chain of thousands is nested, too.
        raise reader.error(0, "the mask has too many parts, or is nested too deeply") from None


@dataclass
class _Reader:
    source: str
    levels: int = 0

    def read(self) -> Mask:
        if not self.source:
            raise self.error(0, "expected a mask such as causal, got an empty text")
        for column, character in enumerate(self.source):
            # The parser fails on null bytes and lone surrogates, and drops comments.
            if not character.isprintable() or character == "#":
                raise self.error(column, f"unexpected character {character!r}")
        return self.mask(ast.parse(self.source, mode="eval").body)

    def mask(self, node: ast.expr) -> Mask:
        self.levels += 1
        if self.levels > _MOST_LEVELS:
            raise self.error(node, f"the mask is nested too deeply, in more than {_MOST_LEVELS} levels")
        mask = self.mask_at_level(node)
        self.levels -= 1
        return mask

    def mask_at_level(self, node: ast.expr) -> Mask:
        match node:
            case ast.BinOp(_, ast.BitAnd(), _):
                return reduce(operator.and_, map(self.mask, self.chain(node, ast.BitAnd)))
            case ast.BinOp(_, ast.BitOr(), _):
                return reduce(operator.or_, map(self.mask, self.chain(node, ast.BitOr)))
            case ast.UnaryOp(ast.Invert(), operand):
                return ~self.mask(operand)
            case ast.Name(name):
                return self.build(node, name, [])
            case ast.Call(ast.Name(name), arguments, []):
                return self.build(node, name, arguments)
            case ast.Call(ast.Name(name), _, [keyword, *_]):
                raise self.error(keyword, f"arguments of {_short(name)} are given by position, without names")
            case ast.BinOp(first) | ast.BoolOp(_, [first, *_]) | ast.Compare(first):
                raise self.error(self.column_after(first), "masks combine by &, | and ~ only")
            case ast.UnaryOp():
                raise self.error(node, "masks combine by &, | and ~ only")
            case _:
                raise self.error(node, "expected a mask such as causal or sliding_window(3)")

    def chain(self, node: ast.expr, kind: type[ast.operator]) -> list[ast.expr]:
        """What an operator joins. To Python's parser each is the operand of the next, and they are one level here."""
        parts: list[ast.expr] = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, kind):
            parts.append(node.right)
            node = node.left
        return [node, *reversed(parts)]

    def build(self, node: ast.expr, name: str, arguments: list[ast.expr]) -> Mask:
        if name in _NEEDS_PYTHON:
            raise self.error(node, f"{name} holds arrays or a function, which a text cannot: build it in Python")
        if name not in _BY_NAME:
            close = get_close_matches(_short(name), [*_BY_NAME, *_NEEDS_PYTHON], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(_MASKS)}"
            raise self.error(node, f"unknown mask {_short(name)!r}; {hint}")
        kind = _BY_NAME[name]
        try:
            if kind is PerHead:
                # The masks are arguments or, as PerHead prints them, a tuple.
                if len(arguments) == 1 and isinstance(arguments[0], ast.Tuple):
                    arguments = arguments[0].elts
                return PerHead([self.mask(part) for part in arguments])
            values = [self.argument(argument) for argument in arguments]
            expected = fields(kind)  # pyright: ignore[reportArgumentType]
            required = sum(field.default is MISSING for field in expected)
            if not required <= len(values) <= len(expected):
                names = ", ".join(field.name for field in expected)
                raise self.error(node, f"expected {name}({names}), got {len(values) or 'no'} argument(s)")
            return kind(*values)
        except MaskSyntaxError:
            raise
        except (TypeError, ValueError) as error:
            raise self.error(node, str(error)) from None

    def argument(self, node: ast.expr) -> int | None:
        match node:
            # A bool is an instance of int, but its type is bool.
            case ast.Constant(value) if value is None or type(value) is int:
                return value
            case ast.UnaryOp(ast.USub(), ast.Constant(value)) if type(value) is int:
                return -value  # the mask refuses it, and says what it expects
            case _:
                given = self.source[self.character(node.col_offset) : self.character(node.end_col_offset or 0)]
                raise self.error(node, f"expected an integer, got {_short(given)}")

    def column_after(self, node: ast.expr) -> int:
        rest = self.source[self.character(node.end_col_offset or 0) :]
        return len(self.source) - len(rest.lstrip(" )"))

    def character(self, byte: int) -> int:
        # The parser counts in bytes of UTF-8.
        return len(self.source.encode()[:byte].decode())

    def error(self, at: int | ast.expr | ast.keyword, problem: str) -> MaskSyntaxError:
        column = at if isinstance(at, int) else self.character(at.col_offset)
        # Where something is missing, the parser may point past the end.
        column = max(0, min(column, len(self.source)))
        start, end = max(0, column - _BEFORE), column + _AFTER
        before = ("..." if start else "") + self._shown(start, column)
        after = self._shown(column, end) + ("..." if end < len(self.source) else "")
        return MaskSyntaxError(f"{problem}\n  {before}{after}\n  {' ' * sum(map(_width, before))}^")

    def _shown(self, start: int, end: int) -> str:
        # A control character could move the cursor, and the caret with it.
        return "".join(character if character.isprintable() else "\ufffd" for character in self.source[start:end])


def _short(text: str) -> str:
    return checks.shown(text, _BEFORE)


def _width(character: str) -> int:
    """The columns of a character in a terminal: none for an accent, two for Chinese."""
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
