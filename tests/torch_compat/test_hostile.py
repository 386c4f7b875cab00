"""Checkpoint folders by someone who means harm: nothing of them runs, and nothing outside of them is read or written.

A process of its own loads them, in which an audit hook writes down what Python does.
"""

import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny import tiny_llama
from tests.torch_compat.test_generate_command import tokenizer_of_bytes
from tests.torch_compat.test_models import write_gguf

CODE = 'from pathlib import Path\nPath(__file__).with_name("it_ran").touch()\nclass Mine:\n    pass\n'

# Loads each folder that it is given, and prints what came of it, and what was done meanwhile.
LOADER = """
import io, json, pickle, runpy, socket, sys
from pathlib import Path
from tests.helpers.audit import watched
from torch_compat.generate import load

for name in sys.argv[1:]:
    folder = Path(name)
    gguf_file = "a.gguf" if (folder / "a.gguf").exists() else None
    sys.stdin = io.StringIO("y\\n" * 20)
    with watched(folder) as done:
        try:
            if folder.name == "control":
                (folder.parent / "outside.json").read_text()
                (folder / "config.json").open("a").close()
                pickle.loads(pickle.dumps(Path("here")))
                socket.getaddrinfo("localhost", 80)
                runpy.run_path(str(folder / "mine.py"))
            model, tokenizer, _ = load(folder, gguf_file)
            outcome = f"loaded {type(tokenizer).__module__}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
    print(json.dumps([folder.name, outcome, done]))
"""


class Evil:
    """A pickle that runs code."""

    def __reduce__(self) -> Any:
        return exec, ("import pathlib; pathlib.Path('it_ran').touch()",)


def of_tokenizer(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "tokenizer_config.json", **keys)


def of_config(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "config.json", **keys)


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def index(*files: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        weight_map = {f"weight {i}": file for i, file in enumerate(files)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return make


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def in_gguf(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    write_gguf(folder / "a.gguf", tiny_llama())
    change(folder / "tokenizer_config.json", auto_map=AUTO)


AUTO = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "mine.Mine") | {
    "AutoTokenizer": ["mine.Mine", "mine.Mine"]
}
OUTSIDE = dict.fromkeys(
    ("vocab_file", "tokenizer_file", "merges_file", "gguf_file", "tokenizer_object"), "../outside.json"
)
# What is changed of a folder that loads, and what comes of it.
FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "good": (lambda folder: None, "loaded transformers."),
    "code-of-a-tokenizer": (of_tokenizer(auto_map=AUTO), "loaded transformers."),
    "code-of-a-tokenizer-alone": (
        of_tokenizer(auto_map=AUTO, tokenizer_class="Mine"),
        "its own code, which is not run",
    ),
    "code-of-a-tokenizer-in-a-list": (of_tokenizer(auto_map=["mine.Mine", "mine.Mine"]), "loaded transformers."),
    "code-elsewhere": (of_tokenizer(auto_map={"AutoTokenizer": ["a/b--mine.Mine", None]}), "loaded transformers."),
    "code-of-a-model": (of_config(auto_map=AUTO), "loaded transformers."),
    "code-of-an-unknown-model": (of_config(auto_map=AUTO, model_type="mine"), "'mine' is not known"),
    "code-beside-gguf": (in_gguf, "loaded transformers."),
    "pickled-weights": (pickled, "model.safetensors is not in it"),
    "a-model-as-tokenizer": (of_tokenizer(tokenizer_class="LlamaForCausalLM"), "must name a tokenizer"),
    "a-retriever-as-tokenizer": (of_config(tokenizer_class="RagRetriever"), "must name a tokenizer"),
    "files-elsewhere": (of_tokenizer(**OUTSIDE), ""),
    "kernels-elsewhere": (of_config(_attn_implementation="a/b", attn_implementation="a/b"), ""),
    "shards-above": (index("../outside.safetensors"), "must name files in its own folder"),
    "shards-anywhere": (index("/etc/passwd"), "must name files in its own folder"),
    "shards-by-other-slashes": (index("..\\outside.safetensors"), "must name files in its own folder"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[str], list[str]]]:
    """For each folder what came of it, what was done that must not be, and what lies around then."""
    home = tmp_path_factory.mktemp("hostile")
    good, work = home / "good", home / "work"
    work.mkdir()
    tiny_llama(vocab_size=257).save_pretrained(good)
    tokenizer_of_bytes("<end>").save_pretrained(good)
    (good / "mine.py").write_text(CODE)
    for name in ("pytorch_model.bin", "vocab.pkl", "training_args.bin"):
        (good / name).write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), good / "adapter_model.bin")
    (good / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b", "peft_type": "LORA"}')
    (home / "outside.json").write_text((good / "tokenizer.json").read_text())
    names = [*FOLDERS, "control"]
    for name in names[1:]:
        shutil.copytree(good, home / name)
        FOLDERS.get(name, FOLDERS["good"])[0](home / name)
    before = sorted(home.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-B", "-c", LOADER, *(str(home / name) for name in names)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    left = [str(path) for path in sorted(home.rglob("*")) if path not in before and "control" not in path.parts]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    return {name: (outcome, events, left) for name, outcome, events in lines}


@pytest.mark.parametrize("name", FOLDERS)
def test_nothing_of_a_folder_runs(name: str, outcomes: dict[str, tuple[str, list[str], list[str]]]) -> None:
    outcome, events, left = outcomes[name]
    assert (events, left) == ([], [])
    assert FOLDERS[name][1] in outcome


def test_the_hook_sees_what_must_not_be_done(outcomes: dict[str, tuple[str, list[str], list[str]]]) -> None:
    events = outcomes["control"][1]
    for seen in ("open.*outside.json", "open.*config.json", "pickle.find_class", "socket.getaddrinfo", "exec.*mine.py"):
        assert any(re.match(seen, event) for event in events), seen
