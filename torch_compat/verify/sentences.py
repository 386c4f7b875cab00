"""Real texts, from one word to a page, in many languages and in code."""

import json
from pathlib import Path

_READ: dict[str, list[str]] = json.loads(Path(__file__).with_name("texts.json").read_text(encoding="utf-8"))
# 64 sentences: proverbs, article 1 of the Universal Declaration of Human Rights, first sentences of books, speech,
# science, everyday life, code.
SENTENCES = tuple(_READ["sentences"])
# Eight of growing length, in the two languages of the original publication and in English.
TEXTS = tuple(_READ["texts"])
