"""The head's products in chunks, and scaling in place: in plain torch and as a kernel."""

import pytest
import torch

import medground_kernels.head as module
from medground_kernels.head import HeadGradients, check_head, head_logits, row_chunks, scale_

pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [-2.5, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [0, 1, 8, 21])
def test_scaling_reaches_every_value_and_no_other(size, factor, dtype, monkeypatch):
    monkeypatch.setattr(module, "_SCALE_BLOCK", 8)
    memory = (torch.arange(size + 40) / 8 - 3).to(dtype)  # the products are exact in 16 bits too
    before = memory.clone()
    values = memory[16 : 16 + size]
    assert scale_(values, torch.tensor(factor)) is values
    want = before.clone()
    want[16 : 16 + size] *= factor
    assert torch.equal(memory, want)


def test_scaling_is_done_in_float32():
    values = torch.tensor([1.0, 3.0, -7.0]).bfloat16()
    scale_(values, torch.tensor(1.005))  # 1 in bfloat16
    torch.testing.assert_close(values.float(), torch.tensor([1.005, 3.015, -7.035]), atol=0, rtol=2**-7)
    assert scale_(torch.tensor([256.0]).bfloat16(), torch.tensor(1.01)).item() in (258.0, 260.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [[slice(0, 7)], [slice(0, 3), slice(3, 6), slice(6, 7)]])
def test_gradients_add_up_over_chunks(chunks, dtype, bias):
    torch.manual_seed(0)
    hidden, weight, dlogits = torch.randn(7, 4).to(dtype), torch.randn(9, 4).to(dtype), torch.randn(7, 9).to(dtype)
    gradients = HeadGradients(hidden, weight, torch.zeros(9, dtype=dtype) if bias else None, (True,) * 3, len(chunks))
    for rows in chunks:
        gradients.add(rows, dlogits[rows])
    dhidden, dweight, dbias = gradients.finish()
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2**-7}
    torch.testing.assert_close(dhidden.double(), dlogits.double() @ weight.double(), **tolerance)
    torch.testing.assert_close(dweight.double(), dlogits.double().T @ hidden.double(), **tolerance)
    assert dhidden.dtype == dweight.dtype == dtype and (dbias is not None) == bias
    if bias:
        assert dbias.dtype == dtype
        torch.testing.assert_close(dbias.double(), dlogits.double().sum(0), **tolerance)


def test_gradients_that_nobody_needs_are_none():
    hidden, weight, bias = torch.ones(2, 4), torch.ones(9, 4), torch.ones(9)
    for needed in ((True, False, False), (False, True, False), (False, False, True), (False,) * 3):
        gradients = HeadGradients(hidden, weight, bias, needed, 1)
        gradients.add(slice(0, 2), torch.ones(2, 9))
        assert tuple(g is not None for g in gradients.finish()) == needed


def test_without_chunks_the_gradient_of_the_weight_is_0():
    gradients = HeadGradients(torch.ones(0, 4), torch.ones(9, 4).bfloat16(), None, (True, True, True), 0)
    dhidden, dweight, dbias = gradients.finish()
    assert dhidden.shape == (0, 4) and dbias is None
    assert torch.equal(dweight, torch.zeros(9, 4).bfloat16())


def test_logits_fill_the_first_rows_of_the_buffer():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 4), torch.randn(9, 4), torch.randn(9)
    buffer = torch.full((3, 9), 7.0)
    for given, want in ((None, hidden @ weight.T), (bias, hidden @ weight.T + bias)):
        logits = head_logits(hidden, weight, given, buffer)
        torch.testing.assert_close(logits, want)
        assert logits.data_ptr() == buffer.data_ptr() and (buffer[2] == 7).all()


def test_chunks_fit_the_budget_in_whole_tiles_where_they_can():
    weight = torch.zeros(10, 3)  # 40 bytes a row of logits
    for N, most, want in (
        (9, 4, [4, 4, 1]),
        (4, 4, [4]),
        (0, 4, []),
        (300, 260, [256, 44]),
        (1000, 400, [384, 384, 232]),
    ):
        chunks = row_chunks(N, weight, 40 * most + 39)
        assert [rows.stop - rows.start for rows in chunks] == want
        assert [rows.start for rows in chunks] == [sum(want[:i]) for i in range(len(want))]
    assert row_chunks(5, weight, None) == [slice(0, 5)]
    with pytest.raises(ValueError, match=r"memory_budget >= 40 bytes, one row of logits; got 39"):
        row_chunks(5, weight, 39)


def test_mistakes_are_named():
    hidden, weight = torch.zeros(2, 4), torch.zeros(9, 4)
    for wrong, message in (
        ((hidden[0], weight, None), r"got \(4,\), \(9, 4\), None"),
        ((hidden, weight[:, :3], None), r"got \(2, 4\), \(9, 3\), None"),
        ((hidden, weight[:0], None), r"got \(2, 4\), \(0, 4\), None"),
        ((hidden, weight, torch.zeros(8)), r"\(8,\), torch\.float32"),
        ((hidden, weight, torch.zeros(9).half()), r"\(9,\), torch\.float16"),
        ((hidden.bfloat16(), weight, None), r"bfloat16, torch\.float32"),
        ((hidden.half(), weight.half(), None), r"float16, torch\.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            check_head(*wrong)
