"""Test position tables: the meaning of each entry, and resizing to another image size."""

import pytest
import torch
import torch.nn.functional as F

from cmtrain.models.position import AbsolutePosition, PairwiseBias, RelativeBias, resize_grid

GRIDS = [(8, 8), (8, 2), (16, 8), (4, 4), (12, 2), (5, 1), (1, 1)]  # queries per side, reduction


@pytest.mark.parametrize(("n", "r"), GRIDS)
def test_relative_bias_is_the_offset_to_the_reduced_key(n, r):
    bias = RelativeBias(heads=3, queries_per_side=n, reduction=r)
    dense, k = bias(), n // r
    assert dense.shape == (3, n * n, k * k)
    for query in range(n * n):
        for key in range(k * k):
            down = (key // k) * r - query // n
            right = (key % k) * r - query % n
            expected = bias.table[:, down + n - 1, right + n - 1]
            assert torch.equal(dense[:, query, key], expected)


@pytest.mark.parametrize(("n", "r"), GRIDS)
def test_relative_bias_uses_every_entry_and_its_gradient_counts_the_pairs(n, r):
    bias = RelativeBias(heads=2, queries_per_side=n, reduction=r)
    bias().sum().backward()
    assert bias.table.grad.min() >= 1
    assert bias.table.grad.sum() == 2 * n**2 * (n // r) ** 2


@pytest.mark.parametrize(("n", "r"), GRIDS)
def test_reimpl_relative_bias_is_the_first_columns_of_the_full_matrix(n, r):
    bias = RelativeBias(None, queries_per_side=n, reduction=r)
    dense, num_keys = bias(), (n // r) ** 2
    assert dense.shape == (1, n * n, num_keys)
    for query in range(n * n):
        for key in range(num_keys):  # a pixel of the unreduced map
            expected = bias.table[key // n - query // n + n - 1, key % n - query % n + n - 1]
            assert dense[0, query, key] == expected


def test_reimpl_pairwise_bias_reads_the_first_columns_only():
    bias = PairwiseBias(None, queries_per_side=8, reduction=4)
    assert torch.equal(bias()[0], bias.table[:, :4])
    bias().sum().backward()
    assert bias.table.grad[:, :4].eq(1).all()
    assert bias.table.grad[:, 4:].eq(0).all()


def test_tables_start_as_their_references_do():
    torch.manual_seed(0)
    assert PairwiseBias(8, 16, 1).table.std().item() == pytest.approx(1.0, rel=0.01)
    assert PairwiseBias(None, 32, 2).table.std().item() == pytest.approx(0.2, rel=0.01)
    assert RelativeBias(None, 128, 8).table.std().item() == pytest.approx(0.2, rel=0.02)
    assert RelativeBias(4, 64, 8).table.std().item() == pytest.approx(0.2, rel=0.02)
    assert AbsolutePosition(64, 32).table.std().item() == pytest.approx(0.2, rel=0.02)


def make(kind: str, n: int):
    return {
        "pairwise": lambda: PairwiseBias(2, n, 4),
        "relative": lambda: RelativeBias(2, n, 4),
        "reimpl pairwise": lambda: PairwiseBias(None, n, 4),
        "reimpl relative": lambda: RelativeBias(None, n, 4),
        "absolute": lambda: AbsolutePosition(6, n),
    }[kind]()


KINDS = ["pairwise", "relative", "reimpl pairwise", "reimpl relative", "absolute"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("old", "new"), [(8, 16), (24, 16), (4, 8)])
def test_resizing_gives_the_new_shape_and_keeps_a_constant(kind, old, new):
    source, target = make(kind, old), make(kind, new)
    resized = target.resized(torch.full_like(source.table, 0.7))
    assert resized.shape == target.table.shape
    used = resized[:, : (new // 4) ** 2] if kind == "reimpl pairwise" else resized
    torch.testing.assert_close(used, torch.full_like(used, 0.7))


@pytest.mark.parametrize("kind", ["pairwise", "relative", "reimpl relative", "absolute"])
def test_resizing_to_the_same_size_changes_no_bit(kind):
    table = make(kind, 16).table
    assert torch.equal(make(kind, 16).resized(table), table)


def test_pairwise_tables_resize_queries_and_keys_separately():
    """A table that is a query map plus a key map becomes the resized query map plus the resized key map."""
    queries, keys = torch.randn(2, 16, 16), torch.randn(2, 4, 4)
    table = queries.flatten(1)[:, :, None] + keys.flatten(1)[:, None, :]
    resized = PairwiseBias(2, 24, 4).resized(table)
    expected = resize_grid(queries, 24).flatten(1)[:, :, None] + resize_grid(keys, 6).flatten(1)[:, None, :]
    torch.testing.assert_close(resized, expected)

    # Columns that are never read must not leak into the others.
    reimpl_table = F.pad(table[0], (0, 240), value=9.0)
    torch.testing.assert_close(PairwiseBias(None, 24, 4).resized(reimpl_table)[:, :36], expected[0])


def test_absolute_positions_resize_as_a_map_and_enlarge_a_ramp_into_a_ramp():
    ramp = torch.arange(8.0)[:, None].expand(8, 8)
    table = torch.stack([ramp, ramp.T], -1).reshape(1, 64, 2)
    resized = AbsolutePosition(2, 16).resized(table).reshape(16, 16, 2)
    inner = slice(4, 12)  # away from the borders, where the kernel is cut
    torch.testing.assert_close(resized[inner, 3, 0], (torch.arange(4.0, 12.0) - 0.5) / 2)
    torch.testing.assert_close(resized[3, inner, 1], (torch.arange(4.0, 12.0) - 0.5) / 2)


def test_a_table_of_another_side_is_resampled_to_the_map():
    position = AbsolutePosition(2, 4, table_side=8)
    x = torch.randn(3, 2, 4, 4)
    of_the_map = AbsolutePosition(2, 4)
    of_the_map.table.data = of_the_map.resized(position.table.data)
    torch.testing.assert_close(position(x), of_the_map(x))
    assert not torch.equal(position(x), x)
    position(x).sum().backward()
    assert position.table.grad.abs().min() > 0  # every entry of it learns
    assert position.resized(torch.randn(1, 16, 2)).shape == (1, 64, 2)


def test_half_precision_tables_are_resized_in_fp32_and_stay_half():
    grid = torch.randn(3, 8, 8)
    resized = resize_grid(grid.half(), 12)
    assert resized.dtype == torch.float16
    torch.testing.assert_close(resized, resize_grid(grid.half().float(), 12).half(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 64, 4), (2, 60, 4), (60, 60), (79, 78), (1, 60, 6), (1, 64, 7)])
def test_a_table_of_another_kind_is_refused(kind, shape):
    with pytest.raises(ValueError, match="cannot be resized"):
        make(kind, 16).resized(torch.zeros(shape))
