"""Each example, in its smallest form, prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def printed(name: str, *arguments: str) -> str:
    """What an example prints, with the flags of these tests: eight devices, and quick compilation."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def numbers(pattern: str, text: str) -> tuple[float, ...]:
    """The numbers where the pattern has its groups."""
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in what was printed: {text}"
    return tuple(map(float, found.groups()))


def test_packed_documents_train_and_are_as_one_by_one(tmp_path: Path) -> None:
    plot = tmp_path / "loss.png"
    text = printed("packed_lm", "--steps", "8", "--length", "128", "--rows", "4", "--plot", str(plot))
    first, last, steps, traced = numbers(
        r"loss: ([\d.]+) at first, ([\d.]+) after (\d+) steps, traced (\d+) time", text
    )
    assert last < first - 0.5
    assert (steps, traced) == (8, 1)
    documents, difference = numbers(r"(\d+) documents, packed and one by one: the losses differ by (\S+)", text)
    assert documents > 1
    assert difference < 1e-5
    assert plot.stat().st_size > 0


def test_decoding_by_the_mask_of_the_published_example_differs_as_the_readme_says() -> None:
    text = printed("gemma_window")
    assert numbers(r"the example differs from itself from token (\d+) on", text) == (9,)
    assert "jaxmask differs from itself by less than 1e-6" in text
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^\$ python examples/gemma_window.py\n((?:(?!```).*\n)+)", readme, re.MULTILINE)
    quoted = [line for line in found[1].splitlines() if line != "..."] if found else []
    assert quoted
    assert [line for line in quoted if line not in text.splitlines()] == []


def test_gpt2_of_flax_has_the_logits_of_pytorch_and_decodes_as_it_reads(tmp_path: Path) -> None:
    plot = tmp_path / "decoding.png"
    text = printed("flax_gpt2", "--steps", "6", "--plot", str(plot))
    (logits,) = numbers(r"logits of a padded batch differ from PyTorch's by (\S+)", text)
    (decoding,) = numbers(r"decoding 6 tokens differs from the whole text by (\S+)", text)
    assert logits < 1e-5
    assert decoding < 1e-5
    assert plot.stat().st_size > 0


def test_a_divided_sequence_gives_what_one_device_gives_and_is_even(tmp_path: Path) -> None:
    plot = tmp_path / "work.png"
    text = printed("long_context", "--length", "2048", "--window", "64", "--plot", str(plot))
    differences = [float(difference) for difference in re.findall(r"differs by (\S+)", text)]
    assert len(differences) >= 4
    assert max(differences) < 1e-5
    assert "the scheme that sends least: halo" in text
    (uneven,) = numbers(r"in order, under Causal\(\): the busiest device does ([\d.]+)", text)
    (even,) = numbers(r"balanced_order, under Causal\(\): the busiest device does ([\d.]+)", text)
    assert even < 1.05 < uneven
    assert plot.stat().st_size > 0


def test_smollm2_writes_sense_whatever_the_padding(tmp_path: Path) -> None:
    plot, new = tmp_path / "steps.png", 3
    text = printed("smollm2", "--max-new-tokens", str(new), "--plot", str(plot))
    assert "The capital of France is Paris" in text
    assert f"{new} of {new} tokens of a padded row are those that it gets without padding" in text
    assert plot.stat().st_size > 0
