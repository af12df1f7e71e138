"""Whatever a text holds, it stays text: in elements, in attributes and in the data of the page's script."""

import json

import pytest
from report_folders import HOSTILE, Seen

from markup import Markup, element, join, json_block


@pytest.mark.parametrize("text", HOSTILE)
def test_text_and_attributes_come_back_as_they_were(text: str) -> None:
    seen = Seen(element("p", text, title=text))
    assert seen.elements == [("p", {"title": text})]
    assert "".join(seen.texts) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_data_block_ends_where_it_ends(text: str) -> None:
    block = json_block("data", {text: [text]}) + element("b", "behind")
    seen = Seen(block)
    assert [name for name, _ in seen.elements] == ["script", "b"]
    assert json.loads(seen.texts[0]) == {text: [text]}
    assert "<!--" not in block


def test_markup_is_not_escaped_again_and_nothing_else_is_markup() -> None:
    inner = element("b", "1 < 2")
    assert element("p", inner, " & ", None, [inner, 3]) == Markup("<p><b>1 &lt; 2</b> &amp; <b>1 &lt; 2</b>3</p>")
    assert not isinstance(inner + "<i>", Markup), "a sum with text is text"
    assert join(inner + "<i>") == "&lt;b&gt;1 &amp;lt; 2&lt;/b&gt;&lt;i&gt;"


def test_attributes() -> None:
    assert element("input", class_="wide", data_control="text", hidden=True, title=None, disabled=False) == (
        '<input class="wide" data-control="text" hidden>'
    )
    with pytest.raises(AssertionError, match="holds nothing"):
        element("input", "text")


def test_values_that_are_no_json_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_block("data", [float("nan")])
