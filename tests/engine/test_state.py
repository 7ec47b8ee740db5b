import copy
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from resbackbone.engine import stopwatch
from resbackbone.engine.distributed import Rank
from resbackbone.engine.optimizers import build_optimizer
from resbackbone.engine.state import NonFinite, TrainState, seed_step

ALONE = Rank(0, 1, torch.device("cpu"))
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
    "plain SGD": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.1, betas=(0.8, 0.95), weight_decay=0.05),
}


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def train_state(make=OPTIMIZERS["SGD"], **options):
    model = network()
    return TrainState(model, make(model.parameters()), ALONE, **options)


def losses_of(model, step=0):
    torch.manual_seed(100 + step)
    y = model(torch.randn(2, 3, 5, 7))
    return {"a": y.square().mean(), "b": (y - 1).abs().mean()}


def update(state, losses=None, rate=0.1, **options):
    """One update from these losses, by default `losses_of` the network."""
    return state.update(lambda _: losses or losses_of(state.model), [None], learning_rate=rate, **options)


def assert_same_weights(model, expected):
    """`expected` is a network or a state dict."""
    expected = expected if isinstance(expected, dict) else expected.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_an_update_is_sgd_on_the_sum_of_the_losses_by_hand():
    state = train_state()
    by_hand = copy.deepcopy(state.model)
    velocity = [torch.zeros_like(p) for p in by_hand.parameters()]
    for step, rate in enumerate((0.5, 0.5, 0.05)):
        losses = losses_of(state.model, step)
        values = update(state, losses, rate)
        assert values == {name: pytest.approx(loss.item()) for name, loss in losses.items()}
        gradients = torch.autograd.grad(sum(losses_of(by_hand, step).values()), list(by_hand.parameters()))
        with torch.no_grad():
            for p, gradient, v in zip(by_hand.parameters(), gradients, velocity, strict=True):
                v.mul_(0.9).add_(gradient + 0.01 * p)  # momentum and weight decay of the optimizer
                p.sub_(rate * v)
    assert state.step == 3
    for p, expected in zip(state.model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(p, expected, atol=1e-6)


def test_several_parts_make_the_update_of_their_mean_and_earlier_gradients_do_not_count():
    state, whole = train_state(), train_state()
    whole.model.load_state_dict(state.model.state_dict())
    state.model[3].bias.sum().backward()  # gradients of an earlier backward are not added
    values = state.update(lambda step: losses_of(state.model, step), [1, 2, 4], learning_rate=0.1)
    parts = [losses_of(whole.model, step) for step in (1, 2, 4)]
    mean = {name: sum(part[name] for part in parts) / 3 for name in parts[0]}
    update(whole, mean)
    assert values == {name: pytest.approx(loss.item()) for name, loss in mean.items()}
    for got, expected in zip(state.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)


def test_parts_add_up_where_each_backward_writes_its_gradients_over_the_last_ones():
    """As the replays of a CUDA graph do."""

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, x):
            ctx.save_for_backward(x)
            return (weight * x).sum()

        @staticmethod
        def backward(ctx, gradient):
            return memory.copy_(gradient * ctx.saved_tensors[0]).view(3), None

    memory = torch.empty(3)
    network = nn.ParameterList([torch.zeros(3)])
    state = TrainState(network, torch.optim.SGD(network.parameters(), lr=1.0), ALONE)
    parts = [torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 0, 5]), torch.tensor([2.0, 1, 1])]
    state.update(lambda x: {"loss": Replayed.apply(network[0], x)}, parts, learning_rate=1.0)
    assert network[0].tolist() == [-2, -1, -3]


def test_forward_backward_and_optimizer_are_timed_apart_and_over_all_parts(monkeypatch):
    state = train_state()
    clock = {"now": 0.0}
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: clock["now"])

    def passes(seconds):
        clock["now"] += seconds

    def losses(part):
        passes(1)
        loss = losses_of(state.model)["a"]
        loss.register_hook(lambda gradient: passes(10))
        return {"a": loss}

    step = state.optimizer.step
    monkeypatch.setattr(state.optimizer, "step", lambda: (passes(100), step()))
    state.update(losses, [None, None], learning_rate=0.1)
    assert state.stopwatch.take(1) == {"forward_seconds": 2, "backward_seconds": 20, "optimizer_seconds": 100}


def test_clipping_bounds_the_length_of_the_update():
    state = train_state(OPTIMIZERS["plain SGD"], clip_grad=0.01)
    before = [p.detach().clone() for p in state.model.parameters()]
    update(state, {"a": 1000 * losses_of(state.model)["a"]}, 1.0)
    steps = [(p - b).flatten() for p, b in zip(state.model.parameters(), before, strict=True)]
    assert torch.cat(steps).norm().item() == pytest.approx(0.01, rel=1e-3)
    update(state, {"a": 3 * state.model[3].bias[0] + 4 * state.model[3].bias[1]}, 1)
    assert state.gradient_norm == pytest.approx(5.0)  # before clipping


@pytest.mark.parametrize("wrong, scaled", [(math.nan, False), (math.inf, False), (-math.inf, False), (math.nan, True)])
def test_a_loss_that_is_not_finite_raises_and_changes_nothing(wrong, scaled):
    state = train_state(scaled=scaled)
    update(state)
    losses, wrong_losses = losses_of(state.model, 1), losses_of(state.model, 2)
    wrong_losses["b"] = wrong_losses["b"] * wrong
    weights, optimizer = copy.deepcopy((state.model.state_dict(), state.optimizer.state_dict()))
    with pytest.raises(NonFinite, match=rf"step 1 is not finite: b is -?{abs(wrong)}"):
        state.update(lambda losses: losses, [losses, wrong_losses], learning_rate=0.7)  # the second part
    assert state.step == 1
    assert_same_weights(state.model, weights)
    after = state.optimizer.state_dict()
    assert after["param_groups"] == optimizer["param_groups"]
    for index, entries in optimizer["state"].items():
        assert torch.equal(after["state"][index]["momentum_buffer"], entries["momentum_buffer"])


def test_a_gradient_that_is_not_finite_under_a_finite_loss_raises_names_its_weights_and_changes_nothing():
    state = train_state()
    weights = copy.deepcopy(state.model.state_dict())
    state.model[3].bias.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFinite, match=r"step 0 is not finite: the gradient of 3\.bias$"):
        update(state, {"a": state.model[3].bias.sum() + state.model[0].weight.sum()}, 1)
    assert state.step == 0
    assert_same_weights(state.model, weights)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_bytes_of_a_checkpoint_are_those_of_its_files_but_for_their_headers(make, tmp_path):
    state = train_state(make)
    update(state)
    state.save(tmp_path)
    save_file(state.model.state_dict(), tmp_path / "model.safetensors")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size - 4000 < state.nbytes <= size


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_loaded_state_trains_on_bit_for_bit(make, tmp_path):
    state = train_state(make)
    for step in range(3):
        update(state, losses_of(state.model, step), 0.1 / (step + 1))
    state.save(tmp_path)
    resumed = train_state(make)
    resumed.model.load_state_dict(state.model.state_dict())
    resumed.load(tmp_path)
    assert resumed.step == 3
    assert resumed.optimizer.param_groups[0]["lr"] == state.optimizer.param_groups[0]["lr"]
    for step in range(3, 6):
        for each in (state, resumed):
            update(each, losses_of(each.model, step), 0.03)
    assert_same_weights(resumed.model, state.model)


def test_a_state_before_its_first_update_is_json_beside_safetensors_and_can_be_loaded(tmp_path):
    train_state().save(tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optimizer.safetensors", "state.json"]
    resumed = train_state()
    resumed.load(tmp_path)
    assert resumed.step == 0 and not resumed.optimizer.state_dict()["state"]


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b'{"step": 1'])
def test_a_broken_checkpoint_is_refused_in_one_line(name, content, tmp_path):
    state = train_state()
    update(state)
    state.save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    resumed = train_state()
    with pytest.raises(ValueError, match="checkpoint .*: cannot be read") as error:
        resumed.load(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert resumed.step == 0


def test_a_checkpoint_of_another_networks_optimizer_is_refused(tmp_path):
    state = train_state()
    update(state)
    state.save(tmp_path)
    fewer = nn.Conv2d(3, 4, 3)
    wider = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
    for other in (fewer, wider):
        with pytest.raises(ValueError, match="checkpoint"):
            TrainState(other, OPTIMIZERS["SGD"](other.parameters()), ALONE).load(tmp_path)


def test_frozen_parameters_go_to_no_group_and_norms_and_biases_are_decayed_or_not():
    model = network()
    model[0].requires_grad_(False)
    options = {"rate": 0.1, "weight_decay": 0.1}
    (everything,) = build_optimizer(model, "sgd", decay_norms=True, **options).param_groups
    assert everything["weight_decay"] == 0.1
    assert [p.shape for p in everything["params"]] == [(4,), (4,), (2, 4, 1, 1), (2,)]
    decayed, rest = build_optimizer(model, "sgd", decay_norms=False, **options).param_groups
    assert ([p.shape for p in decayed["params"]], decayed["weight_decay"]) == ([(2, 4, 1, 1)], 0.1)
    assert ([p.shape for p in rest["params"]], rest["weight_decay"]) == ([(4,), (4,), (2,)], 0.0)


def test_a_steps_randomness_depends_on_seed_step_and_rank_alone():
    def draw(*key):
        seed_step(*key)
        return torch.rand(3).tolist()

    keys = [(seed, step, rank) for seed in (0, 1, 42) for step in (0, 1, 89_999) for rank in (0, 1, 7)]
    drawn = [draw(*key) for key in keys]
    assert [draw(*key) for key in keys] == drawn
    assert len({tuple(numbers) for numbers in drawn}) == len(keys)


# fp16: the loss is scaled


def test_a_scaled_loss_gives_the_update_that_the_loss_gives():
    state, plain = train_state(scaled=True), train_state()
    plain.model.load_state_dict(state.model.state_dict())
    for step in range(3):
        for one in (state, plain):
            update(one, losses_of(one.model, step))
    assert state.gradient_norm == pytest.approx(plain.gradient_norm)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(state.model.state_dict()[name], value)


def overflowing(state):
    """Losses that are finite, and gradients that are not."""
    losses = losses_of(state.model)
    weight = state.model[0].weight
    return {**losses, "c": (weight - weight.detach()).abs().sum().sqrt()}  # the slope of a root at 0 is infinite


def test_an_update_whose_gradient_overflows_is_left_out_and_the_factor_halved():
    state = train_state(scaled=True)
    update(state)
    before, scale, norm = copy.deepcopy(state.model.state_dict()), state.scaler.get_scale(), state.gradient_norm
    parameters = [name for name, _ in state.model.named_parameters()]
    update(state, overflowing(state))
    assert all(torch.equal(state.model.state_dict()[name], before[name]) for name in parameters)
    assert (state.step, state.scaler.get_scale(), state.gradient_norm) == (2, scale / 2, norm)


def test_a_gradient_that_overflows_even_unscaled_is_an_error():
    state = train_state(scaled=True)
    with pytest.raises(NonFinite, match="the gradient of 0.weight"):
        for _ in range(40):
            update(state, overflowing(state))
    assert 10 < state.step < 20  # 65536 was halved to 1


def test_a_resumed_run_scales_as_before(tmp_path):
    state = train_state(scaled=True)
    update(state, overflowing(state))
    state.save(tmp_path)
    resumed = train_state(scaled=True)
    resumed.load(tmp_path)
    assert resumed.scaler.state_dict() == state.scaler.state_dict() and resumed.scaler.get_scale() == 32768
