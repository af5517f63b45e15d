"""K-means: both backends against fp64 formulas, at the edges where such code breaks."""

import pytest
import torch
from torch import Tensor

from gossamer.kernels.kmeans.op import Clusters, cluster_order, kmeans

BACKENDS = ("reference", "triton")
both = pytest.mark.parametrize("backend", BACKENDS)


def _like_wan(*shape: int, device: str) -> Tensor:
    """Return [B, H, N, D] stored as [B, N, H, D], as a projection leaves q and k."""
    batch, heads, num_points, dim = shape
    return torch.randn(batch, num_points, heads, dim, device=device).transpose(1, 2)


def _distance(x: Tensor, centroids: Tensor) -> Tensor:
    return (x.double()[..., :, None, :] - centroids.double()[..., None, :, :]).norm(dim=-1)


def _means(x: Tensor, labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Return the mean (NaN if empty) and size of each cluster, by a loop in fp64."""
    heads = zip(x.flatten(0, 1).double(), labels.flatten(0, 1), strict=True)
    parts = [[points[label == c] for c in range(num_clusters)] for points, label in heads]
    means = torch.stack([torch.stack([part.mean(0) for part in head]) for head in parts])
    sizes = torch.tensor([[len(part) for part in head] for head in parts], device=x.device)
    return means.unflatten(0, x.shape[:2]), sizes.unflatten(0, x.shape[:2])


def _assert_contract(x: Tensor, found: Clusters, num_clusters: int) -> None:
    """Centroids, sizes, order and offsets belong to the labels."""
    means, sizes = _means(x, found.labels, num_clusters)
    assert torch.equal(found.sizes, sizes.int())
    full = sizes > 0
    torch.testing.assert_close(
        found.centroids.double()[full], means[full], rtol=0, atol=3e-7 * x.abs().max().item()
    )
    assert found.centroids.isfinite().all()
    order, offsets = cluster_order(found.labels, num_clusters)
    assert torch.equal(found.order, order) and torch.equal(found.offsets, offsets)
    assert torch.equal(found.order, found.labels.sort(stable=True).indices)
    assert torch.equal(found.offsets.diff(), found.sizes)


@both
@pytest.mark.parametrize(
    ("shape", "num_clusters"),
    [((2, 2, 90, 16), 7), ((1, 2, 65, 20), 65), ((1, 1, 40, 40), 1), ((1, 1, 1, 16), 1)],
)
def test_results_belong_together_and_are_the_same_every_time(
    device: str, shape: tuple[int, ...], num_clusters: int, backend: str
) -> None:
    x = _like_wan(*shape, device=device)
    found = kmeans(x, num_clusters, iterations=3, backend=backend)
    _assert_contract(x, found, num_clusters)
    again = kmeans(x.contiguous(), num_clusters, iterations=3, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_point_goes_to_its_nearest_centroid(
    device: str, dtype: torch.dtype, backend: str
) -> None:
    if dtype == torch.bfloat16 and backend == "triton" and device == "cpu":
        pytest.skip("the interpreter has no bfloat16")
    x = (_like_wan(1, 2, 200, 32, device=device) + 5).to(dtype)
    start = x[:, :, ::9].float() + 0.1 * torch.randn(1, 2, 23, 32, device=device)
    labels = kmeans(x, 23, iterations=1, initial=start, backend=backend).labels
    distance = _distance(x, start)
    chosen = distance.gather(-1, labels.long()[..., None])
    # Triton rounds the centroids, less their mean, to the type of the points.
    spread = (start - start.mean(2, keepdim=True)).norm(dim=-1).max()
    rounding = torch.finfo(dtype).eps * spread if backend == "triton" else 1e-5
    assert (chosen - distance.amin(-1, keepdim=True)).max() <= rounding


@both
def test_rounds_are_lloyds_algorithm(device: str, backend: str) -> None:
    x, num_clusters = _like_wan(1, 2, 80, 16, device=device), 6
    centroids = start = x[:, :, :num_clusters].double()
    for rounds in range(1, 4):
        labels = _distance(x, centroids).argmin(-1)
        means, sizes = _means(x, labels, num_clusters)
        centroids = torch.where(sizes[..., None] > 0, means, centroids)
        found = kmeans(x, num_clusters, iterations=rounds, initial=start, backend=backend)
        assert torch.equal(found.labels, labels.int())
        torch.testing.assert_close(found.centroids.double(), centroids, rtol=0, atol=1e-6)


@both
def test_a_warm_start_at_the_fixed_point_stays_there(device: str, backend: str) -> None:
    x = _like_wan(1, 2, 60, 16, device=device)
    found = kmeans(x, 4, iterations=30, backend=backend)
    again = kmeans(x, 4, iterations=2, initial=found.centroids, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@both
def test_an_empty_cluster_keeps_its_centroid(device: str, backend: str) -> None:
    x = _like_wan(1, 2, 50, 16, device=device)
    start = x[:, :, :5].clone()
    start[:, 0, 2] = 1e3  # near no point
    start[:, 1, 4] = start[:, 1, 1]  # as near as an earlier one
    found = kmeans(x, 5, iterations=1, initial=start, backend=backend)
    assert found.sizes[0, 0, 2] == 0 and found.sizes[0, 1, 4] == 0
    assert torch.equal(found.centroids[0, 0, 2], start[0, 0, 2])
    assert torch.equal(found.centroids[0, 1, 4], start[0, 1, 4])
    _assert_contract(x, found, 5)


@both
def test_more_clusters_than_distinct_points(device: str, backend: str) -> None:
    points = torch.randn(1, 2, 3, 16, device=device)
    x = points.repeat_interleave(10, 2)
    found = kmeans(x, 12, iterations=3, backend=backend)
    _assert_contract(x, found, 12)
    assert ((found.sizes == 10).sum(-1) == 3).all() and ((found.sizes == 0).sum(-1) == 9).all()
    own = found.centroids.gather(2, found.labels.long()[..., None].expand_as(x))
    torch.testing.assert_close(own, x)


@both
def test_equal_points_make_one_cluster(device: str, backend: str) -> None:
    x = torch.full((1, 1, 70, 16), 0.3, dtype=torch.float16, device=device)
    found = kmeans(x, 5, iterations=2, backend=backend)
    assert found.sizes.tolist() == [[[70, 0, 0, 0, 0]]]


@both
def test_clusters_far_from_the_origin_are_told_apart(device: str, backend: str) -> None:
    planted = torch.arange(60, device=device) % 4
    offset = 4 * torch.eye(16, device=device)[:4]
    x = (300 + offset[planted] + 0.5 * torch.rand(1, 1, 60, 16, device=device)).half()
    found = kmeans(x, 4, iterations=4, initial=x[:, :, :4].float(), backend=backend)
    assert torch.equal(found.labels[0, 0], planted.int())


@both
def test_without_a_start_points_of_the_whole_sequence_are_taken(device: str, backend: str) -> None:
    x = torch.arange(1000.0, device=device)[None, None, :, None] * torch.ones(16, device=device)
    found = kmeans(x, 10, iterations=1, backend=backend)
    assert (found.sizes >= 10).all() and (found.sizes <= 200).all()


@both
def test_no_gradient_flows(device: str, backend: str) -> None:
    x = torch.randn(1, 1, 20, 16, device=device, requires_grad=True)
    found = kmeans(x, 3, iterations=1, initial=x[:, :, :3], backend=backend)
    assert not found.centroids.requires_grad


def test_double_points_are_clustered_in_double() -> None:
    x = torch.randn(1, 1, 30, 5, dtype=torch.float64)
    found = kmeans(x, 3, iterations=2)
    assert found.centroids.dtype == torch.float64
    means, _ = _means(x, found.labels, 3)
    torch.testing.assert_close(found.centroids, means)


def test_the_order_sorts_by_label_and_keeps_empty_clusters(device: str) -> None:
    labels = torch.tensor([[[3, 0, 3, 1], [1, 1, 1, 1]]], dtype=torch.int32, device=device)
    order, offsets = cluster_order(labels, 4)
    assert order.tolist() == [[[1, 3, 0, 2], [0, 1, 2, 3]]]
    assert offsets.tolist() == [[[0, 1, 2, 2, 4], [0, 0, 4, 4, 4]]]


def test_the_order_of_more_clusters_than_two_bytes_count(device: str) -> None:
    labels = torch.randint(0, 20000, (2, 1, 50), dtype=torch.int32, device=device)
    order, offsets = cluster_order(labels, 20000)
    assert torch.equal(order, labels.sort(stable=True).indices)
    counts = torch.stack([torch.bincount(row, minlength=20000) for row in labels.flatten(0, 1)])
    assert torch.equal(offsets.diff().flatten(0, 1), counts.int())


def test_the_operator_passes_opcheck(device: str) -> None:
    x = _like_wan(1, 2, 40, 16, device=device)
    kmeans(x, 3, iterations=1, backend="triton")
    torch.library.opcheck(torch.ops.gossamer.kmeans.default, (x, x[:, :, :3], 2))


@both
def test_compiled_equals_eager(device: str, backend: str) -> None:
    x = _like_wan(1, 2, 40, 16, device=device)

    def cluster(x: Tensor) -> Clusters:
        return kmeans(2 * x, 3, iterations=2, backend=backend)

    traced = torch.compile(cluster, fullgraph=True, backend="aot_eager")(x)
    found = cluster(x)
    assert torch.equal(found.labels, traced.labels) and torch.equal(found.order, traced.order)
    torch.testing.assert_close(found.centroids, traced.centroids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_clusters": 0}, "must be 1 to the 9 points, got 0"),
        ({"num_clusters": 10}, "must be 1 to the 9 points, got 10"),
        ({"iterations": 0}, "iterations must be >= 1, got 0"),
        ({"x": torch.zeros(9, 4)}, "non-empty floating-point"),
        ({"x": torch.full((1, 2, 9, 4), torch.nan)}, "x must be finite"),
        ({"initial": torch.zeros(1, 2, 4, 4)}, r"initial must be floating-point \[1, 2, 3, 4\]"),
        ({"initial": torch.full((1, 2, 3, 4), torch.inf)}, "initial must be finite"),
        ({"backend": "flash"}, "backend must be one of"),
        ({"x": torch.zeros(1, 2, 9, 4).double(), "backend": "triton"}, "for backend 'triton'"),
        ({"x": torch.zeros(1, 2, 9, 300), "backend": "triton"}, "at most 256 dims"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(1, 2, 9, 4), "num_clusters": 3, "iterations": 1}
    with pytest.raises(ValueError, match=message):
        kmeans(**(arguments | change))


@pytest.mark.gpu
def test_no_sync_no_recompilation_and_one_cuda_graph() -> None:
    from gossamer.kernels.kmeans import triton as kernels

    def run(num_points: int, num_clusters: int) -> Clusters:
        x = _like_wan(1, 2, num_points, 64, device="cuda").bfloat16()
        return kmeans(x, num_clusters, iterations=2)

    def compiled() -> int:
        jits = (kernels._kmeans_assign, kernels._kmeans_means)
        return sum(len(cache[0]) for jit in jits for cache in jit.device_caches.values())

    run(1000, 30)
    before = compiled()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for num_points, num_clusters in ((1024, 64), (777, 100), (129, 1)):
            run(num_points, num_clusters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled() == before
    x = _like_wan(1, 2, 500, 64, device="cuda").bfloat16()
    expected = kmeans(x, 20, iterations=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kmeans(x, 20, iterations=2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
