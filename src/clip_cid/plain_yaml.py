"""YAML of texts, numbers, lists and mappings, as people write it: bounded, and every fault has its line."""

from typing import Any

import yaml

MOST_BYTES = 4 << 20
_MOST_VALUES = 100_000
_MOST_LEVELS = 40
_MOST_CHARACTERS = 2 * MOST_BYTES  # with aliases written out; without any, a text of MOST_BYTES has less
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")


def parse(text: str) -> Any:
    """The values of a YAML text; dates stay texts, and the two halves of a JSON escape become one character.

    Raises:
        ValueError: It is not YAML, a key is given twice, or it holds more than a recipe can.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _measure(root, {})
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ValueError(said.replace('in "<unicode string>", line', "at line")) from error


def _kind(tag: str) -> str:
    return tag.rpartition(":")[2]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


class _Loader(yaml.SafeLoader):
    """PyYAML's, without tags of other kinds, and with faults as its own errors."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's name and form
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or _kind(tag) in _KINDS
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = self._level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._values += 1
        self._level += 1
        if self._values > _MOST_VALUES or self._level > _MOST_LEVELS:
            self._fail(f"more than {_MOST_VALUES:,} values or {_MOST_LEVELS} levels", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """PyYAML silently keeps the last of two equal keys; this refuses them."""
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    self._fail(f"the key {_shown(key.value)} is given twice", key.start_mark)
                names.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # on odd scalars PyYAML raises nearly everything there is
            return self._fail(f"{_shown(node.value)} is no {_kind(node.tag)}", node.start_mark, error)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        text = super().construct_scalar(node)
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")  # JSON writes an emoji as two escapes
        except UnicodeDecodeError as error:
            return self._fail("half a character (a lone surrogate) in a text", node.start_mark, error)

    def _fail(self, problem: str, mark: Any, cause: Exception | None = None) -> Any:
        raise yaml.constructor.ConstructorError(None, None, problem, mark) from cause


def _measure(node: yaml.Node, done: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Characters and levels of a node with its aliases written out.

    Raises:
        ConstructorError: A text of a few lines would hold more than any file can.
    """
    if id(node) in done:
        return done[id(node)]
    done[id(node)] = (_MOST_CHARACTERS, 0)  # for an alias to a node that holds it

    children = _children(node)
    parts = [_measure(child, done) for child in children]
    characters = 1 + (len(node.value) if not children else sum(count for count, _ in parts))
    levels = 1 + max((below for _, below in parts), default=0)
    if characters > _MOST_CHARACTERS or levels > _MOST_LEVELS:
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"more than {_MOST_CHARACTERS:,} characters or {_MOST_LEVELS} levels with aliases written out",
            node.start_mark,
        )
    done[id(node)] = (characters, levels)
    return characters, levels


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []
