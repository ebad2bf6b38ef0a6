"""A whole trial: who runs, what is measured, what is said of those that cannot."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attending as at
from attending.decoding.momentum import MomentumDecoding
from attending.interventions.attention_calibration import AttentionCalibration
from attending.trials import Trial
from attending.trials.samples import Measure
from tests.trials import models
from tests.trials.models import Hotter, breaking, idle, refusing, untidy

QUALITY = {"perplexity", "drift_kl", "drift_l2", "agreement"}
COST = {"forward_speed", "forward_memory"}
TEXT = {"diversity", "same_text", "new_tokens", "generation_speed", "generation_memory"}


def text() -> str:
    from attending.cli.source import demo_text

    return demo_text()


@pytest.fixture(scope="module")
def real() -> Trial:
    """A real model on real text, with real methods, a stack and two that cannot run."""
    llama = at.zoo.load("llama-stdlib")
    ids = llama.tokenizer(text()[:900], return_tensors="pt")["input_ids"]
    batch = ids[:, : ids.shape[1] // 3 * 3].reshape(3, -1)
    methods = {
        "none": None,
        "again": None,
        "act": AttentionCalibration(alpha=2.0, beta=0.0),
        "momentum": MomentumDecoding(),
        "both": [AttentionCalibration(alpha=2.0, beta=0.0), MomentumDecoding()],
        "refusing": refusing,
        "breaking": breaking,
    }
    return at.trial(
        llama.model,
        batch,
        methods,
        tokenizer=llama.tokenizer,
        generate=16,
        prompt_length=24,
        repeats=2,
        name="llama-stdlib",
    )


def test_every_contender_that_runs_is_measured(real: Trial) -> None:
    assert [row.name for row in real][:2] == ["none", "again"]
    assert {measure.name for measure in real.measures} == QUALITY | COST | TEXT
    for row in real:
        expected = set() if row.name in ("refusing", "breaking") else QUALITY | COST | TEXT
        assert set(row.samples) == expected
        assert all(len(row.samples[name].values) == 2 for name in expected & {"forward_speed"})
    assert len(real["act"].samples["perplexity"].values) == 3


def test_a_control_shows_no_change(real: Trial) -> None:
    """The plain model against itself: what is not time is the same to the last bit."""
    for name in ("drift_kl", "drift_l2"):
        assert set(real["again"].samples[name].values) == {0.0}
    for name in ("perplexity", "diversity", "new_tokens", "forward_memory", "generation_memory"):
        assert real["again"].samples[name] == real["none"].samples[name]
    assert set(real["again"].samples["agreement"].values) == {1.0}
    assert real["again"].notes == []


def test_perplexity_is_that_of_the_model(real: Trial) -> None:
    llama = at.zoo.load("llama-stdlib")
    ids = llama.tokenizer(text()[:900], return_tensors="pt")["input_ids"]
    batch = ids[:, : ids.shape[1] // 3 * 3].reshape(3, -1)
    labels = batch.clone()
    labels[:, :24] = -100
    with torch.no_grad():
        loss = float(llama.model(batch, labels=labels).loss)
        method = AttentionCalibration(alpha=2.0, beta=0.0)
        with method(llama.model, prompt_length=24) as run:
            changed = float(llama.model(batch, labels=labels).loss)
    assert run.edited_calls
    plain, act = real.estimate("none", "perplexity"), real.estimate("act", "perplexity")
    assert plain is not None
    assert act is not None
    assert plain.value == pytest.approx(math.exp(loss), rel=1e-4)
    assert act.value == pytest.approx(math.exp(changed), rel=1e-4)
    ratio = real.change("act", "perplexity")
    assert ratio is not None
    assert ratio.value == pytest.approx(math.exp(changed - loss), rel=1e-4)


def test_a_stack_does_what_both_do(real: Trial) -> None:
    assert real["both"].samples["drift_kl"] == real["act"].samples["drift_kl"]
    assert real["momentum"].samples["drift_kl"] == real["none"].samples["drift_kl"]
    assert real["both"].samples["diversity"] != real["act"].samples["diversity"]
    assert real["both"].methods == [
        "AttentionCalibration(alpha=2.0, beta=0.0)",
        "MomentumDecoding()",
    ]
    assert real["both"].counts["AttentionCalibration.edited_calls"] > 0
    assert real["both"].counts["MomentumDecoding.tokens"] == 3 * 16
    assert real["momentum"].counts["tokens"] == 3 * 16


def test_those_that_cannot_run_say_why(real: Trial) -> None:
    assert real["refusing"].status == "not applicable"
    assert real["refusing"].notes == ["model: expected one that sees, got one that does not."]
    assert real["breaking"].status == "failed"
    assert real["breaking"].notes == ["KeyError: 'a fault'"]
    assert real.estimate("breaking", "perplexity") is None


def test_a_way_to_decode_is_not_blamed_for_forward_passes(real: Trial) -> None:
    assert real["momentum"].notes == []


def test_texts_and_prompts(real: Trial) -> None:
    llama = at.zoo.load("llama-stdlib")
    ids = llama.tokenizer(text()[:900], return_tensors="pt")["input_ids"]
    prompt = ids[:, : ids.shape[1] // 3 * 3].reshape(3, -1)[:, :24]
    with torch.no_grad():
        expected = llama.model.generate(prompt, max_new_tokens=16, do_sample=False)
    assert real["none"].texts == [llama.tokenizer.decode(row[24:]) for row in expected]
    assert real.prompts == [llama.tokenizer.decode(row) for row in prompt]


def test_json_and_back(real: Trial) -> None:
    again = Trial.from_json(real.to_json())
    assert again == real
    assert str(again) == str(real)


def test_json_of_numbers_that_are_not_finite(real: Trial) -> None:
    again = Trial.from_json(real.to_json())
    samples = again["act"].samples["drift_kl"]
    again["act"].samples["drift_kl"] = type(samples)((math.inf, math.nan, -math.inf))
    values = Trial.from_json(again.to_json())["act"].samples["drift_kl"].values
    assert values[0] == math.inf
    assert math.isnan(values[1])
    assert values[2] == -math.inf


def test_frame(real: Trial) -> None:
    frame = real.to_frame().set_index("name")
    assert len(frame) == 7
    assert frame.loc["none", "perplexity_ratio"] == pytest.approx(1.0)
    ratio = frame.loc["act", "perplexity"] / frame.loc["none", "perplexity"]
    assert frame.loc["act", "perplexity_ratio"] == pytest.approx(ratio)
    assert "drift_kl_difference" not in frame
    assert math.isnan(frame.loc["breaking", "perplexity"])
    assert frame.loc["breaking", "note"] == "KeyError: 'a fault'"


def test_text_has_every_contender_and_measure(real: Trial) -> None:
    shown = str(real)
    for measure in real.measures:
        assert measure.label in shown
    assert "refusing: not applicable: model: expected one that sees" in shown
    assert max(map(len, shown.splitlines()[2:])) < 110
    assert real["act"].name in real._repr_html_()


def test_unknown_names_say_what_there_is(real: Trial) -> None:
    with pytest.raises(KeyError, match="'none', 'again', 'act'"):
        real["nothing"]
    with pytest.raises(KeyError, match="'perplexity'"):
        real.estimate("none", "loss")


def test_nothing_is_left_behind() -> None:
    model = models.llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    state = torch.get_rng_state()
    at.trial(model, models.ids(), {"hot": Hotter()}, generate={"do_sample": True, "max_length": 16})
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_method_that_changes_nothing_says_so() -> None:
    found = at.trial(models.llama(), models.ids(), {"idle": idle}, repeats=1)
    (note,) = found["idle"].notes
    assert note.startswith("all that it gave is bit for bit that of 'none'; a way to decode")
    found = at.trial(models.llama(), models.ids(), {"idle": idle}, repeats=1, generate=3)
    assert found["idle"].notes == ["all that it gave is bit for bit that of 'none'"]


def test_warnings_for_the_user_are_notes() -> None:
    @contextmanager
    def warning(model: nn.Module) -> Iterator[None]:
        yield
        warnings.warn("no call was edited", UserWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = at.trial(models.llama(), models.ids(), {"w": [Hotter(), warning]}, repeats=1)
    assert found["w"].status == "ran"
    assert found["w"].notes == ["no call was edited"]


def test_notes_name_the_part_of_the_trial() -> None:
    @contextmanager
    def warning(model: Any) -> Iterator[None]:
        before = model.generation_config.max_length
        seen: list[int] = []
        hook = model.register_forward_hook(lambda *_: seen.append(1))
        yield
        hook.remove()
        if len(seen) > 1:
            warnings.warn("many steps", UserWarning, stacklevel=1)
        assert before == model.generation_config.max_length

    found = at.trial(models.llama(), models.ids(), {"w": [Hotter(), warning]}, generate=4)
    assert found["w"].notes == ["in generation: many steps"]


def test_a_method_that_leaves_a_trace_ends_the_trial() -> None:
    with pytest.raises(RuntimeError, match="not what it was after the block of 'untidy'"):
        at.trial(models.llama(), models.ids(), {"untidy": untidy, "hot": Hotter()})


def test_a_plain_model_that_fails_fails_the_trial() -> None:
    with pytest.raises(IndexError):
        at.trial(models.llama(), models.ids() + models.VOCAB, {"hot": Hotter()})


def test_contenders_take_turns_in_other_orders() -> None:
    order: list[str] = []

    def named(name: str) -> Any:
        @contextmanager
        def method(model: nn.Module) -> Iterator[None]:
            order.append(name)
            yield

        return method

    metric = {"one": lambda model: 1.0}
    methods = {name: named(name) for name in "abcd"}
    at.trial(models.llama(), models.ids(), methods, repeats=4, seed=3, metrics=metric)
    timed = order[-2 * 4 * 4 :][::2]  # a block for the forward pass, one for the metrics
    rounds = ["".join(timed[start : start + 4]) for start in range(0, 16, 4)]
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 1
    again, order[:] = list(order), []
    at.trial(models.llama(), models.ids(), methods, repeats=4, seed=3, metrics=metric)
    assert order == again


def test_metrics_of_the_user() -> None:
    def mean(model: Any) -> Tensor:
        return model(models.ids()).logits.mean()

    metrics = {"mean logit": mean, "parameters": lambda model: 7}
    found = at.trial(models.llama(), models.ids(), {"hot": Hotter()}, metrics=metrics, repeats=2)
    assert len(found["hot"].samples["mean logit"].values) == 2
    change = found.change("hot", "mean logit")
    assert change is not None
    assert change.value != 0
    assert found["hot"].samples["parameters"].values == (7.0, 7.0)
    assert found["hot"].notes == []


def test_sampled_text_differs_between_repeats_and_not_between_runs() -> None:
    settings = {"do_sample": True, "max_new_tokens": 8, "min_new_tokens": 8}
    trials = [
        at.trial(
            models.llama(), models.ids(), {"none": None, "again": None}, generate=settings, seed=5
        )
        for _ in range(2)
    ]
    samples = [found["none"].samples["diversity"] for found in trials]
    assert samples[0] == samples[1]
    assert set(trials[0]["again"].samples["same_text"].values) == {1.0}  # the same seeds


class Sums:
    """A task with a score per item, a score of all, and answers."""

    name = "sums"
    measures = (Measure("right", "Right", "share", "How many.", "higher", "mean", "sum"),)

    def run(self, model: Any) -> Mapping[str, Any]:
        tops = model(models.ids()).logits[:, -1].argmax(-1).tolist()
        return {"right": [float(t % 2) for t in tops], "all": 0.5, "answers": list(map(str, tops))}


def test_a_task() -> None:
    hot = {"none": None, "hot": Hotter(9.0), "again": None}
    found = at.trial(models.llama(), Sums(), hot, repeats=2)
    names = [measure.name for measure in found.measures]
    assert names == ["right", "all", "same_answers", "task_speed", "task_memory"]
    assert found.measures[0].over == "sum"
    assert len(found["hot"].samples["right"].values) == 3
    assert len(found["hot"].samples["all"].values) == 2
    assert found["again"].samples["same_answers"].values == (1.0, 1.0, 1.0)
    assert found["hot"].samples["same_answers"].values != (1.0, 1.0, 1.0)
    assert found.inputs == "task sums"
    assert found["again"].samples["right"] == found["none"].samples["right"]


def test_an_encoder() -> None:
    found = at.trial(models.bert(), models.ids(), {"hot": Hotter()}, repeats=1)
    assert [measure.name for measure in found.measures] == [
        "drift_l2",
        "forward_speed",
        "forward_memory",
    ]
    drift = found.estimate("hot", "drift_l2")
    assert drift is not None
    assert drift.value > 0


def test_a_module_of_ones_own() -> None:
    found = at.trial(nn.Linear(4, 3), torch.randn(5, 4), {"idle": idle}, repeats=1)
    assert found["idle"].samples["drift_l2"].values == (0.0,) * 5
    assert found.measures[1].unit == "samples/s"


def test_methods_that_see_what_they_are_to_predict_are_named() -> None:
    act = AttentionCalibration(alpha=0.5, beta=0.0, layers=(0, 1), min_observers=1)
    found = at.trial(models.llama(), models.ids(), {"act": act, "hot": Hotter()}, repeats=1)
    assert any("give prompt_length" in note for note in found["act"].notes)
    assert found["hot"].notes == []
    told = at.trial(models.llama(), models.ids(), {"act": act}, repeats=1, prompt_length=6)
    assert not any("give prompt_length" in note for note in told["act"].notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "gpt2"}, "model: expected a torch.nn.Module, got str"),
        ({"methods": [Hotter()]}, "methods: expected a mapping of names to methods"),
        ({"methods": {"": Hotter()}}, "methods: expected names that are texts"),
        ({"methods": {"hot": Hotter}}, "got the class Hotter; make one"),
        ({"methods": {"hot": "hot"}}, "gives a context manager, or a list of such"),
        ({"methods": {"hot": nn.Linear(1, 1)}}, "gives a context manager, or a list of such"),
        ({"methods": {"hot": [Hotter(), None]}}, "gives a context manager, or a list of such"),
        ({"methods": {"none": Hotter()}}, '"none" is the name of the plain model'),
        ({"repeats": 0}, "repeats: expected at least 1"),
        ({"inputs": []}, "inputs: expected at least one batch"),
        ({"inputs": "a text"}, "Pass the tokenizer too"),
        ({"prompt_length": 0}, "prompt_length: expected at least 1"),
        ({"prompt_length": 12}, "prompt_length: expected less than the 12 tokens"),
        ({"generate": 0}, "generate: expected at least 1 token"),
        ({"generate": True}, "generate: expected a number of tokens or a mapping"),
        ({"metrics": {"x": 3}}, "metrics: expected a mapping of names to functions"),
        ({"inputs": Sums(), "generate": 3}, "generate: expected None with a task as inputs"),
        ({"model": models.bert(), "generate": 3}, "generate: expected a model that can generate"),
    ],
)
def test_wrong_input(arguments: dict[str, Any], message: str) -> None:
    given = {"model": models.llama(), "inputs": models.ids(), "methods": {"hot": Hotter()}}
    given |= arguments
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        at.trial(given.pop("model"), given.pop("inputs"), given.pop("methods"), **given)
