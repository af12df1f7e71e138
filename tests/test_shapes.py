"""Values of another kind are found, and the place is named."""

import pytest

from shapes import NUMBER, EachOf, Known, OrNone, Shape, check_shape


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (1, NUMBER),
        (0.5, NUMBER),
        (None, OrNone(NUMBER)),
        ({"a": 1, "b": "more"}, {"a": int}),
        ({}, Known({"a": int})),
        ({"a": None}, Known({"a": int})),
        ({"x": 1, "y": 2}, EachOf(int)),
        ([], [str]),
        ([True, False], (bool, bool)),
    ],
)
def test_what_fits(value: object, shape: Shape) -> None:
    check_shape(value, shape)


@pytest.mark.parametrize(
    ("value", "shape", "said"),
    [
        ("1", NUMBER, "the whole is a str, a number is needed"),
        (True, int, "the whole is a bool, a whole number is needed"),
        (0.5, int, "the whole is a float, a whole number is needed"),
        (None, {"a": int}, "the whole is a NoneType, a set of names and values is needed"),
        ({}, {"a": int}, "no a"),
        ({"a": {"b": "x"}}, Known({"a": {"b": int}}), "a: b is a str, a whole number is needed"),
        ({"a": {}}, Known({"a": {"b": int}}), "a has no b"),
        ({"x": 1, "y": "2"}, EachOf(int), "y is a str, a whole number is needed"),
        ({"a": ["x", 1]}, {"a": [str]}, "a: 1 is a int, text is needed"),
        ({"b": 1}, Known({"a": int, "b": int}, needed=("a",)), "no a"),
        ({"a": None}, Known({"a": int}, needed=("a",)), "a is a NoneType, a whole number is needed"),
        ([True], (bool, bool), "the whole has 1 elements, not 2"),
    ],
)
def test_what_does_not(value: object, shape: Shape, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_shape(value, shape)
    assert str(caught.value) == said
