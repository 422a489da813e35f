"""Overlaps of boxes and box sets against slow, obvious forms, in plain torch and as kernels."""

import math
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import medground_kernels.box_iou as module
from medground_kernels.box_iou import box_iou, box_iou_reference, matched_iou, matched_iou_reference

pytestmark = pytest.mark.usefixtures("path")
KINDS = {"iou": 0.0, "giou": -1.0, "diou": -1.0, "ciou": -1.5}
NAN, INF = math.nan, math.inf
NO_BOXES = [
    *[(3.0, 3, 1, 5), (3, 5, 5, 3), (2, 2, 2, 4), (2, 2, 4, 2), (-INF, -INF, INF, INF), (1e20, 0, 1e20, 1)],
    *[tuple(bad if i == j else x for j, x in enumerate((1.0, 1, 4, 4))) for i in range(4) for bad in (NAN, INF, -INF)],
]
seeds = st.integers(0, 1000)
HYPOTHESIS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def slow_overlap(a, b, kind="iou"):
    """The four measures, in Python's floats."""
    sides = [*(a[i + 2] - a[i] for i in (0, 1)), *(b[i + 2] - b[i] for i in (0, 1))]
    if not all(0 < side < INF for side in sides):
        return KINDS[kind]
    aw, ah, bw, bh = sides
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = aw * ah + bw * bh - shared
    iou = shared / union
    w, h = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    if kind == "giou":
        return iou - (w * h - union) / (w * h)
    x, y = (a[0] + a[2]) / 2 - (b[0] + b[2]) / 2, (a[1] + a[3]) / 2 - (b[1] + b[3]) / 2
    diou = iou - (x * x + y * y) / (w * w + h * h)
    v = 4 / math.pi**2 * (math.atan(aw / ah) - math.atan(bw / bh)) ** 2
    alpha = v / (1 - iou + v) if v else 0.0
    return {"iou": iou, "diou": diou, "ciou": diou - alpha * v}[kind]


def slow_matched(pred, truth):
    """The best of all matchings: over subsets of the smaller set, one box of the larger one after another."""
    if not pred or not truth:
        return float(not pred and not truth)
    few, many = sorted((pred, truth), key=len)
    best = [0.0] + [-INF] * (2 ** len(few) - 1)
    for box in many:
        gain = [slow_overlap(box, other) for other in few]
        took = [[best[mask ^ 1 << i] + gain[i] for i in range(len(few)) if mask >> i & 1] for mask in range(len(best))]
        best = [max(old, *new) if new else old for old, new in zip(best, took, strict=True)]
    return max(best) / len(many)


def some_boxes(*shape, extent=10.0):
    corner = torch.rand(*shape, 2) * extent
    return torch.cat([corner, corner + torch.rand(*shape, 2) * extent + 0.01], -1)


def every_pair(pred, truth, kind):
    return torch.tensor([[slow_overlap(a, b, kind) for b in truth.tolist()] for a in pred.tolist()])


def same(got, want):
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.to(torch.float32), atol=2e-7, rtol=0)


@pytest.fixture
def guarded(monkeypatch):
    """Memory that an op takes for its result starts as NaN and is followed by more of them, which must stay."""
    empty, taken = torch.empty, []

    def guarded_empty(*shape, **options):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        taken.append((empty(shape.numel() + 500, **options).fill_(NAN), shape.numel()))
        return taken[-1][0][: shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    yield
    assert all(memory[size:].isnan().all() for memory, size in taken)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("P", "M"), [(1, 1), (7, 5), (3, 64), (16, 17)])
def test_every_kind_equals_its_definition(kind, P, M, guarded):
    torch.manual_seed(0)
    pred, truth = some_boxes(2, P), some_boxes(2, M)
    truth[1, 0] = pred[1, 0]
    want = torch.stack([every_pair(a, b, kind) for a, b in zip(pred, truth, strict=True)])
    same(box_iou(pred, truth, kind=kind), want)
    same(box_iou_reference(pred.double(), truth.double(), kind=kind).float(), want)
    same(box_iou(pred[1], truth[1], kind=kind), want[1])
    same(box_iou(pred[None, :, None], truth[None, :, None], kind=kind), want[None, :, None])


@settings(max_examples=40, **HYPOTHESIS)
@given(st.tuples(*[st.integers(0, 4)] * 4), st.sampled_from(sorted(KINDS)), st.booleans(), seeds)
def test_any_shape(shape, kind, whole, seed):
    torch.manual_seed(seed)
    *lead, P, M = shape
    pred, truth = torch.randn(*lead, P, 4) * 4, torch.randn(*lead, M, 4) * 4  # a quarter are boxes
    pred, truth = (pred.round(), truth.round()) if whole else (pred, truth)
    got = box_iou(pred, truth, kind=kind)
    assert got.shape == shape
    for i, j in product(*map(range, lead)):
        same(got[i, j], every_pair(pred[i, j], truth[i, j], kind).view(P, M))


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_touching_and_distant_boxes(kind):
    shapes = [(10, 10), (100, 1), (1, 100), (1e6, 1e-3), (1e-3, 1e6), (3, 1), (1, 3)]
    places = [(10.0, 0, 20, 10), (10, 10, 11, 12), (-1e6, 0, -1e6 + 1, 1), (2, 3, 4, 5), (2, 2, 4, 6.5)]
    boxes = torch.tensor([(0.0, 0, *shape) for shape in shapes] + places)
    got = box_iou(boxes, boxes, kind=kind)
    same(got, every_pair(boxes, boxes, kind))
    assert (got.diagonal() == 1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e20, 1e37, 1e-20, 1e-37])
def test_any_unit(kind, scale):
    torch.manual_seed(0)
    pred, truth = some_boxes(5) * scale, some_boxes(4) * scale
    truth[0] = pred[0]
    got = box_iou(pred, truth, kind=kind)
    same(got, every_pair(pred, truth, kind))
    assert got[0, 0] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_box_has_the_lowest_value(kind):
    boxes = torch.tensor([[0.0, 0, 10, 10], *NO_BOXES, [2, 2, 6, 6]])
    got = box_iou(boxes, boxes, kind=kind)
    same(got, every_pair(boxes, boxes, kind))
    assert (got[1:-1] == KINDS[kind]).all() and (got[:, 1:-1] == KINDS[kind]).all()


def test_boxes_may_lie_apart_and_be_16_bit():
    torch.manual_seed(0)
    wide = some_boxes(6, 4, 5).transpose(0, 1)  # [4, 6, 5, 4]
    pred, truth = wide[::2, 1, 1:], wide[1::2, 2, ::2]
    want = box_iou(pred.contiguous(), truth.contiguous())
    assert torch.equal(box_iou(pred, truth), want) and want.max() > 0
    assert torch.equal(box_iou(pred.mT.contiguous().mT, truth[:1].expand(2, -1, -1))[:1], want[:1])
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(box_iou(pred.to(dtype), truth), box_iou(pred.to(dtype).float(), truth))


def pad(sets):
    """Sets as [L, P, 4] and counts; what lies past the count overlaps much and must not matter."""
    width = max(len(s) for s in sets) + 1
    out = torch.tensor([0.0, 0, 7, 7]).repeat(len(sets), width, 1)
    for row, s in enumerate(sets):
        out[row, : len(s)] = torch.tensor(s, dtype=torch.float32).reshape(-1, 4)
    return out, torch.tensor([len(s) for s in sets])


def against_all_matchings(pred, n, truth, m):
    sides = zip(pred.tolist(), n.tolist(), truth.tolist(), m.tolist(), strict=True)
    same(matched_iou(pred, n, truth, m), torch.tensor([slow_matched(a[:i], b[:j]) for a, i, b, j in sides]))


corners = st.integers(-3, 12)
boxes = st.lists(st.tuples(corners, corners, corners, corners), max_size=4)


@settings(max_examples=20, **HYPOTHESIS)
@given(st.lists(st.tuples(boxes, boxes), min_size=1, max_size=3))
def test_sets_match_as_well_as_any_permutation(pairs):
    against_all_matchings(*pad([p for p, _ in pairs]), *pad([t for _, t in pairs]))


@settings(max_examples=12, **HYPOTHESIS)
@given(P=st.integers(0, 7), M=st.integers(0, 7), extent=st.sampled_from([0.1, 5.0, 20.0, 1e20]), seed=seeds)
def test_ragged_sets(P, M, extent, seed):
    torch.manual_seed(seed)
    n, m = torch.randint(P + 1, (3,)), torch.randint(M + 1, (3,))
    n[0], m[0] = P, M
    against_all_matchings(some_boxes(3, P, extent=extent), n, some_boxes(3, M, extent=extent), m)


def test_the_reference_tries_all():
    torch.manual_seed(0)
    pred, truth = some_boxes(6, 3), some_boxes(6, 4)
    n, m = torch.tensor([0, 3, 1, 3, 2, 0]), torch.tensor([0, 4, 2, 1, 3, 1])
    want = matched_iou_reference(pred.double(), n, truth.double(), m).float()
    same(matched_iou(pred, n, truth, m), want)
    against_all_matchings(pred, n, truth, m)


@pytest.mark.parametrize(("P", "M"), [(8, 8), (9, 12), (5, 33), (17, 4)])
def test_large_sets_that_all_overlap(P, M, guarded):
    torch.manual_seed(0)
    pred, truth = (some_boxes(2, size, extent=2) + torch.tensor([0.0, 0, 4, 4]) for size in (P, M))
    against_all_matchings(pred, torch.tensor([P, P - 1]), truth, torch.tensor([M - 1, M]))


def test_sets_whose_paths_turn_on_prices():
    torch.manual_seed(0)
    sides, start = torch.rand(60, 12, 2) * 6 + 1, torch.rand(60, 12, 2) * 2
    boxes = torch.cat([start, start + sides], -1)[[2, 14, 16, 37]]  # those that go wrong without
    pred, truth = boxes.split(6, 1)
    against_all_matchings(pred, torch.full((4,), 6), truth, torch.full((4,), 6))


def test_one_box_each():
    one, a, b = torch.tensor(1), torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[2.0, 0, 6, 4]])
    assert matched_iou(a, one, b, one).item() == pytest.approx(1 / 3)


def test_long_paths():
    # each box would rather have its neighbour's: the last one makes all of them move
    step = torch.arange(7.0)[:, None] * torch.tensor([4.0, 0, 4, 0])
    pred, truth = step + torch.tensor([2.3, 0, 12.3, 10]), step + torch.tensor([0.0, 0, 10, 10])
    a = torch.stack([pred, pred.flip(0), pred[torch.tensor([3, 0, 6, 2, 5, 1, 4])]])
    b, n, m = truth.repeat(3, 1, 1), torch.tensor([7, 7, 6]), torch.tensor([7, 6, 7])
    against_all_matchings(a, n, b, m)
    against_all_matchings(b, m, a, n)


def test_a_greedy_choice_is_not_the_best():
    pred, truth = torch.tensor([[0.0, 0, 10, 1], [2, 0, 10, 1]]), torch.tensor([[1.0, 0, 10, 1], [0, 0, 8, 1]])
    two = torch.tensor(2)  # 0.9 + 6 / 10 is less than 8 / 10 + 8 / 9
    assert matched_iou(pred, two, truth, two).item() == pytest.approx((8 / 10 + 8 / 9) / 2)


def test_many_boxes_are_matched_one_to_one():
    torch.manual_seed(0)
    truth, count = torch.arange(40.0)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5]), torch.tensor(40)
    assert matched_iou(truth[torch.randperm(40)], count, truth, count) == 1
    assert matched_iou(truth[:1].repeat(40, 1), count, truth, count).item() == pytest.approx(1 / 40)
    assert matched_iou(truth.flip(0), torch.tensor(10), truth, count).item() == pytest.approx(1 / 4)


def test_empty_sets():
    five, none = some_boxes(3, 5), torch.empty(3, 0, 4)
    n, zero = torch.tensor([0, 1, 5]), torch.zeros(3, dtype=torch.int64)
    assert matched_iou(five, n, five, zero).tolist() == matched_iou(five, zero, five, n).tolist() == [1, 0, 0]
    assert matched_iou(five, n, none, zero).tolist() == matched_iou(none, zero, five, n).tolist() == [1, 0, 0]
    assert matched_iou(none, zero, none, zero).tolist() == [1, 1, 1]
    for lead in ((0,), (2, 0)):
        boxes, counts = torch.empty(*lead, 5, 4), torch.empty(lead, dtype=torch.int64)
        assert matched_iou(boxes, counts, boxes, counts).shape == lead


def test_what_is_no_box_counts_as_one():
    mixed, good = torch.tensor([*NO_BOXES, (1.0, 1, 4, 4)]), torch.tensor([[1.0, 1, 4, 4]])
    one, many = torch.tensor(1), torch.tensor(len(mixed))
    for sets in ((mixed, many, good, one), (good, one, mixed, many), (mixed, many, mixed, many)):
        assert matched_iou(*sets).item() == pytest.approx(1 / len(mixed))
    assert matched_iou(mixed, many - 1, good, one) == 0


def test_sets_may_lie_apart_and_be_16_bit():
    torch.manual_seed(0)
    wide, count = some_boxes(4, 8).bfloat16(), torch.tensor([3, 9, 0, 9, 4, 9, 2, 9])
    pred, truth = wide[:, 1::2], wide[:, ::2].transpose(0, 1).contiguous().transpose(0, 1)
    n, m = count[::2], torch.tensor([3, 4, 2, 1])
    want = matched_iou(pred.float().contiguous(), n.contiguous(), truth.float().contiguous(), m)
    assert torch.equal(matched_iou(pred, n, truth, m), want) and want.max() > 0
    square = matched_iou(pred.unflatten(0, (2, 2)), n.view(2, 2), truth.unflatten(0, (2, 2)), m.view(2, 2))
    assert torch.equal(square, want.view(2, 2))


def test_the_same_twice_in_any_company_and_nothing_to_learn_from():
    torch.manual_seed(0)
    pred, truth = some_boxes(3, 4).requires_grad_(), some_boxes(3, 6)
    n, m = torch.tensor([4, 2, 3]), torch.tensor([6, 6, 1])
    first = matched_iou(pred, n, truth, m)
    assert torch.equal(first, matched_iou(pred, n, truth, m)) and not first.requires_grad
    assert torch.equal(first, torch.stack([matched_iou(pred[i], n[i], truth[i], m[i]) for i in range(3)]))
    assert torch.equal(box_iou(pred, truth), box_iou(pred, truth)) and not box_iou(pred, truth).requires_grad


def test_wrong_boxes_are_named():
    box, count = torch.zeros(2, 1, 4), torch.zeros(2, dtype=torch.int64)
    for pred, truth, message in (
        (box[..., :3], box, r"\(2, 1, 3\), \(2, 1, 4\)"),
        (box, torch.zeros(2, 1, 5), r"\(2, 1, 4\), \(2, 1, 5\)"),
        (box[0, 0], box[0, 0], r"got \(4,\), \(4,\)"),
        (box, box[:1], r"\(2, 1, 4\), \(1, 1, 4\)"),
        (box.double(), box, r"float64, torch\.float32"),
        (box, box.long(), r"float32, torch\.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            box_iou(pred, truth)
        with pytest.raises(ValueError, match=message):
            matched_iou(pred, count, truth, count)


def test_wrong_kinds_and_counts_are_named():
    two, one = torch.zeros(2, 1, 4), torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="ciou; got 'eiou'"):
        box_iou(two, two, kind="eiou")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"counts \(2,\).*got \(3,\) torch.int64, \(2,\) torch.int64"):
        matched_iou(two, torch.ones(3, dtype=torch.int64), two, one)
    with pytest.raises(ValueError, match=r"got \(2,\) torch.int64, \(2,\) torch.float32"):
        matched_iou(two, one, two, one.float())


def test_counts_out_of_range_do_not_pass(path):
    pred, truth = some_boxes(5, 2), some_boxes(5, 3)
    n, m = torch.tensor([2, 3, 2, -1, 2]), torch.tensor([3, 3, 4, 2, -1])
    if not pred.is_cuda:
        for i, wrong in ((1, r"0\.\.2, the boxes given; got 3\.\.3"), (2, r"0\.\.3.*4\.\.4"), (3, "-1"), (4, "-1")):
            with pytest.raises(ValueError, match=wrong):
                matched_iou(pred[i : i + 1], n[i : i + 1], truth[i : i + 1], m[i : i + 1])
    if path == "triton":
        # nobody looks at counts on CUDA but the kernel
        assert module._launch_matched(pred, n, truth, m).isnan().tolist() == [False, True, True, True, True]
