"""Signatures as their authors wrote them: shapes and aliases by name, not what Python makes of them.

Python shows ``Bool[Array | np.ndarray, "batch kv"]`` as the union of two classes with long names. The source does not.
"""

import ast
import inspect
import textwrap
from dataclasses import is_dataclass
from typing import Any

from docutils.nodes import Element, TextElement
from sphinx.addnodes import desc_signature, pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.intersphinx import resolve_reference_any_inventory
from sphinx.util.nodes import make_refnode

# Where names of annotations are described that are not spelled out there.
LONG_NAMES = {
    "Array": "jax.Array",
    "Any": "typing.Any",
    "Callable": "collections.abc.Callable",
    "Iterable": "collections.abc.Iterable",
    "Iterator": "collections.abc.Iterator",
    "Literal": "typing.Literal",
    "Mapping": "collections.abc.Mapping",
    "NamedSharding": "jax.sharding.NamedSharding",
    "PartitionSpec": "jax.sharding.PartitionSpec",
    "Path": "pathlib.Path",
    "Sequence": "collections.abc.Sequence",
    "SupportsIndex": "typing.SupportsIndex",
    "np.ndarray": "numpy.ndarray",
    "nnx.Module": "flax.nnx.Module",
    "nnx.Rngs": "flax.nnx.Rngs",
}


def _tree(what: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(what))).body[0]


def _fields(kind: Any) -> str:
    """The fields of a dataclass, its bases' first, as arguments."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base) and base.__module__.startswith(("jaxmask", "torch_compat")):
            for line in _tree(base).body:
                if isinstance(line, ast.AnnAssign) and not ast.unparse(line.annotation).startswith("ClassVar"):
                    name, default = ast.unparse(line.target), line.value
                    found[name] = f"{name}: {ast.unparse(_unquoted(line.annotation))}"
                    found[name] += f" = {_default(default)}" if default is not None else ""
    return f"({', '.join(found.values())})"


def _unquoted(annotation: Any) -> Any:
    """An annotation without the quotes around all of it, as one of a class that is defined later has them."""
    match annotation:
        case ast.Constant(value=str(text)):
            return ast.parse(text, mode="eval").body
        case _:
            return annotation


def _default(value: ast.expr) -> str:
    """A default, the one inside of ``field(default=...)`` where it is there."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field"):
        return next((ast.unparse(word.value) for word in value.keywords if word.arg == "default"), "...")
    return ast.unparse(value)


def as_written(
    app: Sphinx, what: str, name: str, found: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None] | None:
    """The signature in the source, for the event ``autodoc-process-signature``."""
    if signature is None:
        return None
    if what == "class" and is_dataclass(found):
        return _fields(found), None
    is_method = what in ("method", "class")
    found = found.__init__ if what == "class" else found
    found = inspect.unwrap(getattr(found, "__func__", found))
    if not inspect.isfunction(found):
        return None
    tree = _tree(found)
    arguments = tree.args
    decorators = {ast.unparse(decorator) for decorator in tree.decorator_list}
    if (is_method and "staticmethod" not in decorators) or "classmethod" in decorators:
        (arguments.posonlyargs or arguments.args).pop(0)
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = _unquoted(argument.annotation)
    returns = None if tree.returns is None or what == "class" else ast.unparse(_unquoted(tree.returns))
    return f"({ast.unparse(arguments)})", returns


def by_short_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, contents: TextElement) -> Element | None:
    """What a short name refers to: an object of ours, if only one has it; else one of another project."""
    if node.get("refdomain") != "py":
        return None
    target, domain = node["reftarget"], env.domains.python_domain
    if target in LONG_NAMES:
        node["reftarget"] = LONG_NAMES[target]
        return resolve_reference_any_inventory(env, False, node, contents)
    kinds = domain.objtypes_for_role(node["reftype"]) or []
    found = {
        name: entry
        for name, entry in domain.objects.items()
        if not entry.aliased and entry.objtype in kinds and f".{name}".endswith(f".{target}")
    }
    if len(found) == 1:
        [(name, entry)] = found.items()
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contents, name)
    return None


def without_link(app: Sphinx, env: BuildEnvironment, node: pending_xref, contents: TextElement) -> Element | None:
    """Shapes, dtypes, and aliases that the text beside them explains, have no page."""
    return contents if _is_in_signature(node) else None


def _is_in_signature(node: Element) -> bool:
    parent = node.parent
    return parent is not None and (isinstance(parent, desc_signature) or _is_in_signature(parent))


def setup(app: Sphinx) -> dict[str, bool]:
    """An extension of Sphinx."""
    app.connect("autodoc-process-signature", as_written)
    # Before and after intersphinx, whose priority is 500.
    app.connect("missing-reference", by_short_name, priority=400)
    app.connect("missing-reference", without_link, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
