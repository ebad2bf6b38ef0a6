"""`generate` changes within a block, for one model, and is what it was afterwards."""

import pytest
import torch
from torch import nn

from attending.decoding.generating import changed_generate, setting


class Model(nn.Module):
    def generate(self, inputs=None, limit=3, **kwargs):
        return "model", inputs, limit, kwargs


def test_nested_blocks_compose_and_leave_no_trace():
    model, other = Model(), Model()
    before = dict(vars(model))

    def named(name):
        def change(generate, arguments):
            return (name, *generate(**arguments))

        return change

    with changed_generate(model, named("outer")), changed_generate(model, named("inner")):
        assert model.generate(1, key=2) == ("inner", "outer", "model", 1, 3, {"key": 2})
        assert model.generate(limit=4) == ("inner", "outer", "model", None, 4, {})
        assert other.generate() == ("model", None, 3, {})
        assert model.state_dict() == {}
    assert vars(model) == before
    assert model.generate() == ("model", None, 3, {})


def test_what_the_instance_had_comes_back():
    model = Model()
    model.generate = own = lambda **arguments: "own"
    with changed_generate(model, lambda generate, arguments: generate(**arguments) + "er"):
        assert model.generate() == "owner"
    assert model.generate is own


def test_after_an_error():
    model = Model()
    with (
        pytest.raises(KeyError),
        changed_generate(model, lambda generate, arguments: generate(**arguments)),
    ):
        raise KeyError
    assert "generate" not in vars(model)


def test_blocks_left_in_the_wrong_order():
    model = Model()
    one = changed_generate(model, lambda generate, arguments: generate(**arguments))
    other = changed_generate(model, lambda generate, arguments: generate(**arguments))
    one.__enter__()
    other.__enter__()
    with pytest.raises(RuntimeError, match="reverse order"):
        one.__exit__(None, None, None)


def test_where_a_setting_comes_from():
    from types import SimpleNamespace

    model = Model()
    assert setting({}, model, "do_sample") is None
    model.generation_config = SimpleNamespace(do_sample=True, top_k=None)
    assert setting({}, model, "do_sample") is True
    assert setting({"generation_config": SimpleNamespace(top_k=4)}, model, "do_sample") is True
    assert setting({"generation_config": SimpleNamespace(top_k=4)}, model, "top_k") == 4
    assert setting({"do_sample": False}, model, "do_sample") is False


def test_a_model_that_does_not_generate():
    with (
        pytest.raises(ValueError, match="model: expected one with generate"),
        changed_generate(nn.Linear(1, 1), lambda generate, arguments: torch.zeros(1)),
    ):
        pass
