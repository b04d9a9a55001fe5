"""Parse untrusted YAML: limited in size, nodes, nesting and numbers; no code in it is run."""

from collections.abc import Iterator
from typing import Any

import yaml

from modules.limits import MAX_DEPTH
from modules.text_files import check_depth, check_numbers

MAX_YAML_CHARACTERS = 1 << 18  # the parser reads about 100,000 a second; settings have a few thousand
MAX_NODES = 20_000  # with every alias written out
MAX_NUMBER_CHARACTERS = 400  # maximum characters of a number in any notation
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _BoundedLoader(yaml.SafeLoader):
    """YAML loader that stops at the first event beyond the limits, before nodes are made."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_events = 0
        self._depth = 0

    def get_event(self) -> Any:
        event = super().get_event()
        self._num_events += 1
        if self._num_events > 2 * MAX_NODES:
            raise _too_many()
        if isinstance(event, yaml.CollectionStartEvent):
            self._depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            self._depth -= 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        return event


def parse_yaml(text: str) -> Any:
    """Parse a YAML text that contains one document.

    Raises:
        ValueError: If it is not YAML, too long, nested too deeply or in itself, if it has too many nodes with
            its aliases expanded, or if a number is too large for a float.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, and at most {MAX_YAML_CHARACTERS:,} are read")
    try:
        loader = _BoundedLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check_nodes(root)
        content = loader.construct_document(root)
        check_depth(content)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # messages of our own checks begin with "it" and need no other reason
        if isinstance(error, ValueError) and str(error).startswith("it "):
            raise
        raise ValueError(f"a value does not fit its tag or its place ({error})") from None  # such as !!int ""
    check_numbers(content)
    return content


def _check_nodes(root: yaml.Node) -> None:
    """Raise ValueError if a node contains itself, or if expanding the aliases gives too many nodes."""
    # The nodes are walked depth first, without recursion; a node that has several aliases is walked once.
    sizes: dict[int, int] = {}  # id of a finished node -> number of nodes including nested ones
    open_ids: set[int] = set()  # nodes of `path`
    path = [(root, _list_children(root))]  # from the root to the current node, each with its open children
    while path:
        node, children = path[-1]
        open_ids.add(id(node))
        child = next((child for child in children if id(child) not in sizes), None)
        if child is not None:
            if id(child) in open_ids:
                raise ValueError("it has an alias to a node that contains the alias")
            path.append((child, _list_children(child)))
            continue
        path.pop()
        open_ids.discard(id(node))
        sizes[id(node)] = 1 + sum(sizes[id(child)] for child in _list_children(node))
        if sizes[id(node)] > MAX_NODES:
            raise _too_many()
        if node.tag in _NUMBERS and len(str(node.value)) > MAX_NUMBER_CHARACTERS:
            raise ValueError(
                f"it has a number of {len(str(node.value)):,} characters, and no setting has one"
            )


def _list_children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value


def _too_many() -> ValueError:
    return ValueError(f"it has more than {MAX_NODES:,} nodes")
