"""What gradients of looked-up vectors become on their way to the tables equals a loop over vectors; the dense step clips as torch does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedTensor

from triptych.embeddings.gradients import GradientGuard
from triptych.launch.build import Optimizers

BAD = [math.nan, math.inf, -math.inf, 1e30]  # the last is finite, and its square is not


def loop(grad_BV, widths, bound):
    """Each vector by itself, in float64: guarded gradients, how many were not finite, and in which rows."""
    result, zeroed, rows = grad_BV.double().clone(), 0, set()
    for row in range(len(result)):
        start = 0
        for width in widths:
            vector = result[row, start : start + width]
            if not bool(torch.isfinite(vector).all()) or vector.abs().max() > 1e19:
                zeroed, rows = zeroed + 1, rows | {row}
                vector.zero_()
            elif vector.norm() > bound:
                vector *= bound / vector.norm()
            start += width
    return result, zeroed, rows


def random_gradient(num_rows, width, seed, bad):
    torch.manual_seed(seed)
    grad_BV = torch.randn(num_rows, width) * 10 ** torch.empty(num_rows, width).uniform_(-6, 2)
    for value in bad:
        grad_BV.view(-1)[torch.randint(0, grad_BV.numel(), ())] = value
    return grad_BV


class TestGuard:
    @settings(deadline=None, max_examples=200)
    @given(
        st.integers(1, 7),
        st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=6),
        st.sampled_from([None, 1e-3, 0.5, 50.0]),
        st.lists(st.sampled_from(BAD), max_size=3),
        st.integers(0, 999),
    )
    def test_pooled_vectors_are_guarded_one_by_one(self, num_rows, widths, bound, bad, seed):
        guard = GradientGuard(bound)
        values_BV = torch.randn(num_rows, sum(widths), requires_grad=True)
        keyed = guard(KeyedTensor([f"f{i}" for i in range(len(widths))], widths, values_BV))
        assert torch.equal(keyed.values(), values_BV) and keyed.length_per_key() == widths
        grad_BV = random_gradient(num_rows, sum(widths), seed, bad)
        keyed.values().backward(grad_BV)
        expected, zeroed, rows = loop(grad_BV, widths, math.inf if bound is None else bound)
        torch.testing.assert_close(values_BV.grad.double(), expected, rtol=1e-6, atol=0)
        assert int(guard.zeroed) == zeroed
        bad_B = guard.bad_rows()
        assert (set() if bad_B is None else set(torch.nonzero(bad_B).flatten().tolist())) == rows

    @settings(deadline=None, max_examples=100)
    @given(
        st.lists(st.integers(0, 3), min_size=1, max_size=5),
        st.sampled_from([None, 0.5]),
        st.lists(st.sampled_from(BAD), max_size=2),
        st.integers(0, 999),
    )
    def test_single_vectors_are_guarded_and_their_rows_known(self, lengths, bound, bad, seed):
        guard, width = GradientGuard(bound), 4
        vector_MD = torch.randn(sum(lengths), width, requires_grad=True)
        guarded_MD = guard.single("seen", vector_MD, torch.tensor(lengths))
        assert torch.equal(guarded_MD, vector_MD)
        grad_MD = random_gradient(len(vector_MD), width, seed, bad if len(vector_MD) else [])
        guarded_MD.backward(grad_MD)
        expected, zeroed, vectors = loop(grad_MD, [width], math.inf if bound is None else bound)
        torch.testing.assert_close(vector_MD.grad.double(), expected, rtol=1e-6, atol=0)
        row_M = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).tolist()
        bad_B = guard.bad_rows()
        assert (set() if bad_B is None else set(torch.nonzero(bad_B).flatten().tolist())) == {row_M[vector] for vector in vectors}
        assert int(guard.zeroed) == zeroed

    def test_what_needs_nothing_is_not_touched(self):
        """Bit for bit, and rows of a step before are forgotten."""
        guard, grad_BV = GradientGuard(1e9), torch.randn(5, 8)
        for grad in (torch.full((5, 8), math.nan), grad_BV):
            values_BV = torch.zeros(5, 8, requires_grad=True)
            guard(KeyedTensor(["a", "b"], [4, 4], values_BV)).values().backward(grad)
        assert torch.equal(values_BV.grad, grad_BV) and guard.bad_rows() is None and int(guard.zeroed) == 10


def parameters_with(gradients):
    parameters = [torch.nn.Parameter(torch.ones_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def optimizers_of(dense, tables=(), clip_norm=None):
    fused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    replicated = [torch.optim.SGD(tables, lr=1.0)] if tables else []
    return Optimizers(fused, torch.optim.SGD(dense, lr=1.0), *replicated, clip_norm=clip_norm)


class TestDenseStep:
    @pytest.mark.parametrize("clip_norm", [None, 0.1, 3.0, 1e4])
    def test_the_norm_over_all_dense_weights_is_bounded_and_tables_are_no_part_of_it(self, clip_norm):
        torch.manual_seed(0)
        gradients, table_gradient = [torch.randn(3, 4), torch.randn(7)], torch.full((5, 2), 1e6)
        dense, tables = parameters_with(gradients), parameters_with([table_gradient])
        optimizers_of(dense, tables, clip_norm).step()
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
        for parameter, gradient in zip(dense, gradients, strict=True):
            torch.testing.assert_close(parameter.data, 1 - factor * gradient, rtol=1e-5, atol=1e-6)
        assert torch.equal(tables[0].data, 1 - table_gradient)

    @pytest.mark.parametrize("clip_norm", [None, 1.0])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_gradient_that_is_not_finite_reaches_no_dense_weight(self, value, clip_norm):
        dense, tables = parameters_with([torch.tensor([1.0, value]), torch.ones(3)]), parameters_with([torch.ones(2)])
        optimizers = optimizers_of(dense, tables, clip_norm)
        optimizers.step()
        assert not optimizers.gradients_finite and all(parameter.eq(1).all() for parameter in dense) and tables[0].eq(0).all()
        optimizers.zero_grad()
        optimizers.step()  # as after a loss that was not finite
        assert optimizers.gradients_finite and all(parameter.eq(1).all() for parameter in dense) and tables[0].eq(0).all()
