"""HTML that is escaped by construction: text becomes markup through `element` alone."""

import html
import json
from typing import Any

# Those without an end tag, of the ones that a report is made of.
VOID_ELEMENTS = frozenset({"input"})
# A data block ends at `</script` and changes its meaning at `<!--`, whatever stands in the JSON around it
# (https://html.spec.whatwg.org/multipage/scripting.html#restrictions-for-contents-of-script-elements).
_IN_JSON = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


class Markup(str):
    """Text that is HTML already; every other `str` is text to show."""

    __slots__ = ()


def element(name: str, *children: object, **attributes: object) -> Markup:
    """One element.

    Args:
        name: of the element.
        children: `Markup` as it is, anything else as escaped text; None is left out, lists are flattened.
        attributes: values are escaped; True stands alone, None and False are left out. A trailing underscore is dropped
            and the others become hyphens, so that `class_` and `data_value` can be written.
    """
    written = "".join(_attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    if name in VOID_ELEMENTS:
        assert not children, f"<{name}> holds nothing"
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """Children one after the other, escaped as in `element`."""
    return Markup("".join(_child(child) for child in children))


def json_block(identity: str, value: Any) -> Markup:
    """A script element that holds data for the page's script; no text in it can end it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_IN_JSON)
    return Markup(f'<script type="application/json" id="{html.escape(identity)}">{text}</script>')


def _child(child: object) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, (list, tuple)):
        return join(*child)
    return html.escape(str(child))


def _attribute(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
