"""Experts, gates and sharing equal a naive loop over experts, gates and tasks: outputs, and gradients of input and parameters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.drawn import sections, small
from triptych.mmoe.experts import BatchedLinear, BatchedMLP
from triptych.mmoe.gates import Gates
from triptych.mmoe.model import ModelSection, make_sharing
from triptych.mmoe.sharing import PLE, MMoE, SharedBottom

some_examples = settings(deadline=None, max_examples=100)


def linear(layer, group, x_BI):
    return torch.stack([sum(row[i] * layer.weight_GIO[group, i] for i in range(len(row))) for row in x_BI]) + layer.bias_GO[group]


def mlp(layers, group, x_BI):
    for layer in layers.linears:
        x_BI = linear(layer, group, x_BI)
        x_BI = torch.where(x_BI > 0, x_BI, 0.0)
    return x_BI


def gate(gates, group, x_BI, expert_outputs, visible):
    """Softmax over the visible experts alone, then their weighted sum."""
    odds_BV = torch.exp(linear(gates.linear, group, x_BI)[:, visible])
    return sum(odds_BV[:, [v]] * expert_outputs[expert] for v, expert in enumerate(visible)) / odds_BV.sum(1, keepdim=True)


def naive_ple(ple, x_BI, tasks, section):
    owners = [task for task in range(tasks) for _ in range(section.task_experts)] + ["shared"] * section.experts
    inputs = dict.fromkeys([*range(tasks), "shared"], x_BI)
    for level in ple.levels:
        outputs = [mlp(level.experts, expert, inputs[owner]) for expert, owner in enumerate(owners)]
        seen = {task: [e for e, owner in enumerate(owners) if owner in (task, "shared")] for task in range(tasks)}
        if level is not ple.levels[-1]:
            seen["shared"] = list(range(len(owners)))
        inputs = {group: gate(level.gates, g, inputs[group], outputs, visible) for g, (group, visible) in enumerate(seen.items())}
    return [inputs[task] for task in range(tasks)]


def naive_sharing(module, x_BI, tasks, section):
    if section.sharing == "shared_bottom":
        return [mlp(module.bottom, 0, x_BI) for _ in range(tasks)]
    if section.sharing == "mmoe":
        outputs = [mlp(module.experts, expert, x_BI) for expert in range(section.experts)]
        return [gate(module.gates, task, x_BI, outputs, list(range(section.experts))) for task in range(tasks)]
    return naive_ple(module, x_BI, tasks, section)


def gradients(output, of):
    """Gradients of a sum of the output's elements, each with a factor of its own."""
    factors = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad((output * factors).sum(), of, materialize_grads=True)


def assert_same(output, expected, of):
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients(output, of), gradients(expected, of), rtol=1e-11, atol=1e-12)


def randomised(module):
    """In float64, with every weight and bias drawn: initial biases may be zero."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def make(section, tasks, inputs, seed=0):
    torch.manual_seed(seed)
    return randomised(make_sharing(section, tasks, inputs))


class TestAgainstNaiveLoops:
    @some_examples
    @given(sections, small, small, st.integers(1, 5), st.integers(0, 99))
    def test_sharing(self, section, tasks, inputs, batch, seed):
        module = make(section, tasks, inputs, seed)
        x_BI = torch.randn(batch, inputs, dtype=torch.float64, requires_grad=True)
        output_TBH = module(x_BI)
        assert output_TBH.shape == (tasks, batch, section.expert_layers[-1])
        assert_same(output_TBH, torch.stack(naive_sharing(module, x_BI, tasks, section)), [x_BI, *module.parameters()])

    @some_examples
    @given(small, small, st.lists(small, max_size=3), st.integers(1, 5), st.booleans(), st.integers(0, 99))
    def test_layers(self, groups, inputs, layers, batch, shared, seed):
        torch.manual_seed(seed)
        module = randomised(BatchedMLP(groups, inputs, layers))
        x = torch.randn(*([] if shared else [groups]), batch, inputs, dtype=torch.float64, requires_grad=True)
        expected = torch.stack([mlp(module, group, x if shared else x[group]) for group in range(groups)])
        if layers:
            assert_same(module(x), expected, [x, *module.parameters()])
        else:
            assert module(x) is x

    def test_linear_is_torch_linear_a_group(self):
        torch.manual_seed(0)
        batched, x_GBI = randomised(BatchedLinear(3, 5, 2)), torch.randn(3, 4, 5, dtype=torch.float64)
        for group, output_BO in enumerate(batched(x_GBI)):
            one = nn.Linear(5, 2).double()
            one.weight.data, one.bias.data = batched.weight_GIO[group].T, batched.bias_GO[group]
            torch.testing.assert_close(output_BO, one(x_GBI[group]), rtol=1e-13, atol=1e-14)

    @some_examples
    @given(small, small, small, st.integers(1, 5), st.integers(0, 99))
    def test_shared_input_is_equal_inputs_of_ones_own(self, groups, inputs, outputs, batch, seed):
        torch.manual_seed(seed)
        layer = randomised(BatchedLinear(groups, inputs, outputs))
        x_BI = torch.randn(batch, inputs, dtype=torch.float64, requires_grad=True)
        assert_same(layer(x_BI), layer(x_BI.repeat(groups, 1, 1)), [x_BI, *layer.parameters()])

    def test_initial_weights_spread_as_those_of_one_layer_whatever_the_groups(self):
        torch.manual_seed(0)
        one = nn.init.xavier_uniform_(torch.empty(400, 250))
        for groups in (1, 7):
            layer = BatchedLinear(groups, 250, 400)
            for weight_IO in layer.weight_GIO:
                assert weight_IO.abs().max().item() == pytest.approx(one.abs().max().item(), rel=1e-3)
                assert weight_IO.std().item() == pytest.approx(one.std().item(), rel=0.01)
                assert weight_IO.mean().item() == pytest.approx(0, abs=0.001)
            assert not layer.bias_GO.any()


class TestGates:
    @some_examples
    @given(st.data(), small, small, st.integers(1, 6), st.integers(1, 5), st.sampled_from([0.1, 1.0, 1e3]), st.booleans())
    def test_weights(self, data, num_gates, inputs, experts, batch, scale, shared):
        """They sum to 1, those of hidden experts are exactly 0, and the others are a softmax among themselves."""
        torch.manual_seed(data.draw(st.integers(0, 99)))
        mask = data.draw(st.lists(st.lists(st.booleans(), min_size=experts, max_size=experts), min_size=num_gates, max_size=num_gates))
        visible_GE = torch.tensor(mask)
        visible_GE[:, data.draw(st.integers(0, experts - 1))] = True
        gates = randomised(Gates(num_gates, inputs, experts, visible_GE))
        x = scale * torch.randn(*([] if shared else [num_gates]), batch, inputs, dtype=torch.float64)
        weights_GBE = gates.weights(x)
        torch.testing.assert_close(weights_GBE.sum(-1), torch.ones(num_gates, batch, dtype=torch.float64), rtol=1e-14, atol=0)
        for g, visible_E in enumerate(visible_GE):
            assert (weights_GBE[g][:, ~visible_E] == 0).all()
            scores_BV = linear(gates.linear, g, x if shared else x[g])[:, visible_E]
            torch.testing.assert_close(weights_GBE[g][:, visible_E], torch.softmax(scores_BV, 1), rtol=1e-9, atol=1e-14)

    def test_every_expert_is_visible_unless_told(self):
        told, untold = Gates(2, 3, 4, torch.ones(2, 4, dtype=torch.bool)), Gates(2, 3, 4)
        untold.load_state_dict(told.state_dict())
        x_BI = torch.randn(5, 3)
        assert torch.equal(told.weights(x_BI), untold.weights(x_BI))
        assert (untold.weights(x_BI) > 0).all()


class TestWhoseGradientReachesWhom:
    @some_examples
    @given(st.integers(2, 4), small, st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
    def test_no_other_tasks_experts_at_the_last_level(self, tasks, experts, task_experts, levels, seed):
        section = ModelSection(sharing="ple", experts=experts, task_experts=task_experts, levels=levels, expert_layers=(5, 3))
        ple = make(section, tasks, 4, seed)
        last = ple.levels[-1]
        output_TBH = ple(torch.randn(6, 4, dtype=torch.float64))
        for task in range(tasks):
            others = [e for e in range(tasks * task_experts) if e // task_experts != task]
            for parameter in last.experts.parameters():
                gradient = torch.autograd.grad(output_TBH[task].sum(), parameter, retain_graph=True)[0]
                assert (gradient[others] == 0).all()
            gate_gradient_GIE = torch.autograd.grad(output_TBH[task].sum(), last.gates.linear.weight_GIO, retain_graph=True)[0]
            assert (gate_gradient_GIE[[g for g in range(tasks) if g != task]] == 0).all()

    @pytest.mark.parametrize("levels", [1, 2, 3])
    def test_all_experts_below_the_last_level(self, levels):
        ple = make(ModelSection(sharing="ple", experts=2, task_experts=2, levels=levels, expert_layers=(32,)), 3, 4)
        output_TBH = ple(torch.randn(64, 4, dtype=torch.float64))
        for depth, level in enumerate(ple.levels):
            gradient_EIO = torch.autograd.grad(output_TBH[0].sum(), level.experts.linears[0].weight_GIO, retain_graph=True)[0]
            reached = [bool((gradient_IO != 0).any()) for gradient_IO in gradient_EIO]
            assert reached == ([True] * 8 if depth < levels - 1 else [True, True, False, False, False, False, True, True])


class TestMakeSharing:
    @pytest.mark.parametrize(
        "sharing, made",
        [
            ("shared_bottom", lambda **common: SharedBottom(3, 7, **common)),
            ("mmoe", lambda **common: MMoE(3, 7, experts=4, **common)),
            ("cgc", lambda **common: PLE(3, 7, experts=4, task_experts=2, levels=1, **common)),
            ("ple", lambda **common: PLE(3, 7, experts=4, task_experts=2, levels=3, **common)),
        ],
    )
    def test_dispatch(self, sharing, made):
        section = ModelSection(sharing=sharing, experts=4, task_experts=2, levels=3, expert_layers=(6, 5), dropout=0.25)
        torch.manual_seed(3)
        expected = made(layers=(6, 5), dropout=0.25)
        torch.manual_seed(3)
        module = make_sharing(section, 3, 7)
        assert str(module) == str(expected)
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), expected.parameters(), strict=True))


class TestDropout:
    def test_a_layer_drops_its_share_and_scales_the_rest(self):
        torch.manual_seed(0)
        layer, x_BI = randomised(BatchedMLP(4, 8, [50], dropout=0.3)), torch.randn(100, 8, dtype=torch.float64)
        kept = layer.eval()(x_BI)
        trained = layer.train()(x_BI)
        dropped = (trained == 0) & (kept > 0)
        torch.testing.assert_close(trained, torch.where(dropped, 0.0, kept / 0.7), rtol=1e-12, atol=0)
        count = int((kept > 0).sum())
        assert abs(int(dropped.sum()) - 0.3 * count) < 5 * (0.3 * 0.7 * count) ** 0.5

    @pytest.mark.parametrize("sharing", ["shared_bottom", "mmoe", "cgc", "ple"])
    def test_only_in_training(self, sharing):
        section = ModelSection(sharing=sharing, experts=2, task_experts=1, expert_layers=(6, 5), dropout=0.5)
        module, x_BI = make(section, 2, 4), torch.randn(16, 4, dtype=torch.float64)
        without = make(section.model_copy(update={"dropout": 0.0}), 2, 4)
        assert torch.equal(module.eval()(x_BI), without.train()(x_BI))
        assert not torch.allclose(module.train()(x_BI), without(x_BI))
