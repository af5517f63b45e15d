import pytest
import torch
import torch.nn.functional as F

from gossamer.sparse import orders
from gossamer.sparse.attach import method_from_spec
from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.compensation import Centroid
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.layout import RowMajor, Tiles, TokenGrid
from gossamer.sparse.layouts.clusters import SortedClusters
from gossamer.sparse.layouts.per_head import ORDERS, PerHead
from gossamer.sparse.policies import Hybrid

GRID = TokenGrid(5, 3, 6)
GRIDS = [GRID, TokenGrid(1, 4, 4), TokenGrid(7, 1, 1), TokenGrid(1, 1, 1), TokenGrid(3, 2, 5, 3, 9)]


def qkv(grid, seed=0, heads=4):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, heads, grid.num_tokens, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def sparse(k, layout=None):
    layout = layout or PerHead(tile=[2, 2, 2], q_block=16, kv_block=8)
    method = SparseMethod(layout, MeanPool(), Hybrid(k=k), Centroid())
    attention = SparseAttention(method, 4)
    if isinstance(attention.layout, PerHead):
        attention.layout.set_choice(torch.arange(4))
    return attention


@pytest.mark.parametrize("grid", GRIDS)
def test_permute_and_unpermute_are_inverse_and_each_head_has_its_order(grid):
    q, k, v = qkv(grid)
    layout = sparse(1.0).layout
    before, after = grid.text_before, grid.text_before + grid.num_video
    expected = [
        orders.row_major(grid),
        orders.temporal_major(grid),
        orders.tiles(grid, (2, 2, 2)),
        orders.hilbert(grid),
    ]
    for side in layout(q, k, v, grid):
        moved = side.permute(q)
        assert torch.equal(side.unpermute(moved), q)
        for head, order in enumerate(expected):
            assert torch.equal(moved[:, head, before:after], q[:, head, before:after][:, order])
        text = [*range(before), *range(after, grid.num_tokens)]
        assert torch.equal(moved[:, :, text], q[:, :, text])


@pytest.mark.parametrize("grid", GRIDS)
def test_everything_selected_equals_dense_attention(grid):
    q, k, v = qkv(grid)
    out = sparse(1.0)(q, k, v, grid, torch.ones(2))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_blocks_are_full_but_the_last_whatever_the_order():
    for side in sparse(1.0).layout(*qkv(GRID), GRID):
        assert side.is_uniform and side.offsets.ndim == 1
        assert (side.sizes[:-1] == side.block_size).all()


def test_each_head_attends_as_if_all_heads_had_its_order():
    q, k, v = qkv(GRID)
    mixed = sparse(0.3)(q, k, v, GRID, torch.ones(2))
    for head in range(4):
        attention = sparse(0.3)
        attention.layout.set_choice(torch.full((4,), head))
        same = attention(q, k, v, GRID, torch.ones(2))
        assert torch.equal(same[:, head], mixed[:, head])
    row_major = sparse(0.3, RowMajor(q_block=16, kv_block=8))(q, k, v, GRID, torch.ones(2))
    assert torch.equal(row_major[:, 0], mixed[:, 0])


def test_the_order_of_tiles_is_that_of_the_layout_of_tiles():
    assert torch.equal(orders.tiles(GRID, (2, 2, 3)), Tiles(block=(2, 2, 3)).build(GRID)[0].order)


def test_gradients_pass_through_the_orders_of_the_heads():
    grid = TokenGrid(2, 2, 2)
    inputs = [x[:1, :, :, :4].clone().requires_grad_() for x in qkv(grid)]
    attention = sparse(0.5, PerHead(tile=[2, 1, 2], q_block=4, kv_block=2))
    attention(*inputs, grid, torch.ones(1))  # fixes the mask, as a step does
    assert torch.autograd.gradcheck(lambda *x: attention(*x, grid, torch.ones(1)), inputs)


def test_the_choice_is_part_of_the_layers_state():
    first, second = (
        sparse(0.3),
        SparseAttention(SparseMethod(PerHead(), MeanPool(), Hybrid(), Centroid()), 4),
    )
    assert first.state_dict()["layout.choice"].tolist() == [0, 1, 2, 3]
    second.load_state_dict(first.state_dict())
    assert second.layout.choice.tolist() == [0, 1, 2, 3]


def test_every_head_starts_in_the_first_order():
    layout = PerHead(names=["hilbert", "tiles"]).for_heads(3)
    assert (layout.names, layout.choice.tolist()) == (("hilbert", "tiles"), [0, 0, 0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"names": ["zigzag"]}, f"names=zigzag: allowed is {', '.join(ORDERS)}"),
        ({"names": []}, "names=.*add one"),
        ({"tile": [2, 2]}, "tile=.*give three sizes"),
        ({"tile": [2, 0, 2]}, "tile=0"),
        ({"kv_block": 0}, "kv_block=0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        PerHead(**arguments)


def test_a_choice_outside_the_orders_is_refused():
    with pytest.raises(ValueError, match="allowed is 0 to 1"):
        PerHead(names=["row_major", "tiles"]).set_choice(torch.tensor([2]))


def test_a_method_can_be_built_from_its_config():
    folder = "gossamer.sparse"
    spec = {
        "layout": {"_target_": f"{folder}.layouts.per_head.PerHead", "names": ["hilbert"]},
        "estimator": {"_target_": f"{folder}.estimators.mean_pool.MeanPool"},
        "policy": {"_target_": f"{folder}.policies.Hybrid"},
        "compensation": {"_target_": f"{folder}.compensation.Drop"},
    }
    assert method_from_spec(spec).layout.block_shape == (128, 64)


MIXED = ["row_major", "sorted_clusters", "hilbert"]


def mixed(choice, k=0.3):
    method = SparseMethod(
        PerHead(names=MIXED, q_block=16, kv_block=8), MeanPool(), Hybrid(k=k), Centroid()
    )
    attention = SparseAttention(method, 4)
    attention.layout.set_choice(torch.tensor(choice))
    return attention


@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 2, 5, 3, 9)])
def test_heads_in_clusters_are_as_in_the_layout_of_sorted_clusters(grid):
    x = qkv(grid)
    attention = mixed([1, 0, 1, 2])
    out = attention(*x, grid, torch.ones(2))
    q, kv = (max(1, round(grid.num_video / block)) for block in (16, 8))
    clusters = SortedClusters(q_block=16, kv_block=8, num_q=q, num_kv=kv)
    alone = sparse(0.3, clusters)(*x, grid, torch.ones(2))
    torch.testing.assert_close(out[:, [0, 2]], alone[:, [0, 2]])
    kv_layout = attention.mask.kv_layout
    assert kv_layout.offsets.ndim == 1 and kv_layout.is_uniform == (grid.text_before == 0)


def test_heads_without_clusters_cost_no_k_means(monkeypatch):
    attention = mixed([0, 2, 2, 0])
    monkeypatch.setattr(SortedClusters, "cluster", None)
    attention(*qkv(GRID), GRID, torch.ones(2))
    attention.layout.set_choice(torch.tensor([0, 1, 2, 0]))
    attention.reset()
    with pytest.raises(TypeError):
        attention(*qkv(GRID), GRID, torch.ones(2))


def test_a_loaded_choice_moves_heads_into_clusters():
    first, second = mixed([1, 0, 1, 2]), mixed([0, 0, 0, 0])
    x = qkv(GRID)
    second(*x, GRID, torch.ones(2))
    for name, tensor in second.state_dict().items():
        tensor.copy_(first.state_dict()[name])
    second.reset()
    assert torch.equal(second(*x, GRID, torch.ones(2)), first(*x, GRID, torch.ones(2)))


def test_heads_in_clusters_go_on_from_the_step_before():
    attention = mixed([1, 0, 1, 2])
    x = qkv(GRID)
    for step in range(2):
        attention.reset("cond", is_first=step == 0)
        attention(*x, GRID, torch.ones(2))
    carried = attention.codebooks.carried["cond"].codebook
    assert carried.k.shape[:2] == (2, 2)  # of the two heads alone
    assert attention.codebooks.hit_rate.shape == (2, 2, 2)
    assert attention.codebooks.hit_rate.min() > 0.9  # the same tokens again
    attention.reset("cond")
    attention.layout.set_choice(torch.tensor([1, 1, 1, 2]))
    attention(*x, GRID, torch.ones(2))  # a codebook of other heads is not used
    assert attention.codebooks.carried["cond"].codebook.k.shape[:2] == (2, 3)
