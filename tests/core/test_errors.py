import pytest

from jattrib.core.errors import InvalidInputError, check_choice


def test_a_choice_that_is_none_is_named_with_those_there_are_and_the_nearest():
    check_choice("form", "binned", ("gaussian", "binned"))
    with pytest.raises(InvalidInputError) as caught:
        check_choice("form", "bined", ("gaussian", "binned"))
    assert caught.value.got == "form = 'bined'"
    assert caught.value.expected == "one of gaussian, binned"
    assert caught.value.remedy == "did you mean 'binned'?"
    with pytest.raises(InvalidInputError, match=r"form = None\n.*gaussian, binned\n.*name one of them"):
        check_choice("form", None, {"gaussian": 1, "binned": 2})
