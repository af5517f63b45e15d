"""Methods by name on a stock Wan pipeline: dense steps and layers, prompts, branches, detach."""

import copy
from contextlib import contextmanager
from types import MethodType

import pytest
import torch
from tiny import tiny_wan

import gossamer
from gossamer.sparse.attach import attach, attentions, detach, hit_rates
from gossamer.sparse.attention import SparseMethod
from gossamer.sparse.compensation import Centroid
from gossamer.sparse.error_budget import ErrorBudget
from gossamer.sparse.estimators.error_aware import ErrorAware
from gossamer.sparse.layouts.clusters import SemanticClusters
from gossamer.sparse.methods import NAMES, method_named

diffusers = pytest.importorskip("diffusers")
SMALL = {
    "sparge": {"q_block": 16, "kv_block": 8},
    "svg1": {"q_block": 16, "kv_block": 8},
    "svg2": {"num_q": 6, "num_kv": 16},
    "svg_ear": {"num_q": 6, "num_kv": 16},
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stock():
    """A WanPipeline that takes prompt embeddings and returns latents."""
    transformer = tiny_wan(in_channels=16, out_channels=16, num_layers=3)
    with torch.no_grad():
        for block in transformer.blocks:
            block.attn1.to_out[0].weight.mul_(8)  # so that masks show in the latents
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, prompt=0, steps=3):
    generator = torch.Generator().manual_seed(100 + prompt)
    text = torch.randn(2, 1, 8, 16, generator=generator)
    return pipe(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        height=128,
        width=128,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(prompt),
        output_type="latent",
    ).frames


@contextmanager
def without_step_index(pipe):
    """Let the pipeline name its calls only, as Wan's image-to-video and VACE pipelines do."""
    model = pipe.transformer
    inner = model.cache_context
    model.__dict__["cache_context"] = MethodType(lambda self, name, **kwargs: inner(name), model)
    try:
        yield
    finally:
        model.__dict__["cache_context"] = inner


@contextmanager
def recorded(pipe):
    """Yield a list that gets, for each call of each layer, its name and its density."""
    seen = []

    def note(layer):
        def hook(module, args, out):
            seen.append((layer, 1.0 if module.kept.is_dense else float(module.mask.density.mean())))

        return hook

    handles = [a.register_forward_hook(note(n)) for n, a in attentions(pipe).items()]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_a_method_changes_the_output_and_detach_leaves_no_bit_of_it(name):
    pipe = stock()
    state = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    before = latents(pipe)
    assert gossamer.attach(pipe, method_named(name, 0.8, **SMALL[name])) is pipe
    sparse = latents(pipe)
    assert sparse.isfinite().all() and not torch.equal(sparse, before)
    assert gossamer.detach(pipe) is pipe
    after = pipe.transformer.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert torch.equal(latents(pipe), before)
    assert not pipe.transformer._forward_pre_hooks


def test_a_name_and_a_sparsity_are_the_method_of_that_name():
    grid = {"height": 256, "width": 256}  # 3 x 16 x 16 = 768 tokens: blocks of the default size
    results = []
    for arguments in (
        {"method": "sparge", "sparsity": 0.8},
        {"source": method_named("sparge", 0.8)},
    ):
        pipe = gossamer.attach(stock(), **arguments)
        with recorded(pipe) as seen:
            frames = pipe(
                prompt_embeds=torch.ones(1, 8, 16), num_frames=9, num_inference_steps=1,
                guidance_scale=1.0, generator=torch.Generator().manual_seed(0),
                output_type="latent", **grid,
            ).frames  # fmt: skip
        results.append(frames)
        assert all(abs(density - 2 / 12) < 1e-6 for _, density in seen)
    assert torch.equal(*results)
    assert gossamer.attach(stock(), method="svg2") is not None
    default = gossamer.attach(stock(), method="svg_ear")
    assert float(next(iter(attentions(default).values())).policy.k[0]) == pytest.approx(0.1)


@pytest.mark.parametrize("by_index", [True, False], ids=["index", "timestep"])
@pytest.mark.parametrize("name", ["svg2", "svg_ear"])
def test_the_next_prompt_finds_nothing_of_the_one_before(name, by_index):
    def attached():
        return attach(stock(), method_named(name, 0.8, **SMALL[name]), dense_steps=1)

    @contextmanager
    def named(pipe):
        if by_index:
            yield
        else:
            with without_step_index(pipe):
                yield

    used, fresh = attached(), attached()
    with named(used), named(fresh):
        latents(used, prompt=1)
        carried = next(iter(attentions(used).values())).codebooks.carried
        assert set(carried) == {"cond", "uncond"}
        assert torch.equal(latents(used, prompt=2), latents(fresh, prompt=2))
        assert torch.equal(latents(used, prompt=2), latents(fresh, prompt=2))
    without = attach(stock(), method_named(name, 0.8, **SMALL[name]), dense_steps=1)
    assert torch.equal(latents(without, prompt=2), latents(fresh, prompt=2))


@pytest.mark.parametrize("by_index", [True, False], ids=["index", "timestep"])
def test_first_steps_and_layers_are_dense(by_index):
    pipe = attach(
        stock(), method_named("svg2", 0.8, **SMALL["svg2"]), dense_steps=2, dense_layers=1
    )
    for _ in range(2):
        with recorded(pipe) as seen:
            if by_index:
                latents(pipe, steps=4)
            else:
                with without_step_index(pipe):
                    latents(pipe, steps=4)
        assert len(seen) == 4 * 2 * 3  # steps x branches x layers
        for call, (layer, density) in enumerate(seen):
            is_dense = call < 2 * 2 * 3 or layer == "blocks.0.attn1"
            assert (density == 1.0) is is_dense
            assert is_dense or density < 0.3


@pytest.mark.parametrize("dense", [{"dense_steps": 3}, {"dense_layers": 3}])
def test_nothing_sparse_is_the_stock_pipeline_bit_for_bit(dense):
    pipe = attach(stock(), method_named("svg_ear", 0.9), **dense)
    assert torch.equal(latents(pipe), latents(stock()))


def test_a_copy_has_a_run_of_its_own():
    pipe = attach(stock(), method_named("svg2", 0.8, **SMALL["svg2"]), dense_steps=1)
    fresh = copy.deepcopy(pipe.transformer)
    want = latents(pipe, prompt=1)
    used = copy.deepcopy(pipe.transformer)
    pipe.transformer = used
    latents(pipe, prompt=2)
    pipe.transformer = fresh
    assert torch.equal(latents(pipe, prompt=1), want)
    own = [next(iter(attentions(m).values())).codebooks.carried["cond"] for m in (used, fresh)]
    assert not torch.equal(own[0].codebook.q, own[1].codebook.q)


@pytest.mark.parametrize("steps", [4, 8])
def test_few_step_samplers_report_hit_rates_and_cluster_again_when_the_error_grew(
    steps, monkeypatch
):
    def attached(keep_until):
        layout = SemanticClusters(num_q=6, num_kv=16, keep_until=keep_until)
        policy = ErrorBudget(k=0.2, unit="tokens")
        return attach(stock(), SparseMethod(layout, ErrorAware(), policy, Centroid()))

    found = []
    cluster = SemanticClusters.cluster
    monkeypatch.setattr(
        SemanticClusters, "cluster", lambda *args: found.append(args[-1]) or cluster(*args)
    )
    counts = []
    for keep_until in (None, 0.0, 1e6):
        found.clear()
        pipe = attached(keep_until)
        assert latents(pipe, steps=steps).isfinite().all()
        first = [previous for previous in found if previous is None]
        assert len(first) == 2 * 3  # branches x layers start cold
        counts.append(len(found))
        if keep_until is None:
            for attention in attentions(pipe).values():
                rate = attention.codebooks.hit_rate
                assert rate.shape == (2, 1, 2) and rate.min() > 0 and rate.max() <= 1
            rates = gossamer.hit_rates(pipe)
            assert list(rates) == list(attentions(pipe))
    always, when_grown, never = counts
    assert always == steps * 2 * 3 and never == 2 * 3
    assert never < when_grown < always


def test_hit_rates_are_means_over_all_warm_steps_and_the_log_says_them_at_the_end(caplog):
    pipe, steps = stock(), {}
    assert hit_rates(attach(pipe, method_named("svg2", 0.8, **SMALL["svg2"]))) == {}

    def note(name):
        def hook(module, args, out):
            now = module.codebooks.hit_rate
            if now is not None and (not steps[name] or now is not steps[name][-1]):
                steps[name].append(now)

        return hook

    for name, attention in attentions(pipe).items():
        steps[name] = []
        attention.register_forward_hook(note(name))
    latents(pipe, steps=4)
    latents(pipe, prompt=1, steps=2)
    found = hit_rates(pipe)
    for name, seen in steps.items():
        assert len(seen) == 2 * (3 + 1)  # branches x warm steps of both prompts
        torch.testing.assert_close(found[name], torch.stack(seen).mean((0, 2)))
    with caplog.at_level("INFO", logger="gossamer"):
        detach(pipe)
    q, k = (100 * torch.stack([*found.values()]).mean((0, 2))).tolist()
    assert f"{q:.1f} % of q, {k:.1f} % of k tokens stayed" in caplog.text
    caplog.clear()
    detach(attach(pipe, method_named("sparge", 0.8, **SMALL["sparge"])))
    assert "stayed" not in caplog.text
    with pytest.raises(ValueError, match="call attach first"):
        hit_rates(pipe)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "svg3"}, r"method=svg3: allowed is .*did you mean svg"),
        ({"method": "svg2", "sparsity": 1.0}, r"sparsity=1\.0"),
        ({"sparsity": 0.9}, r"sparsity=0\.9: allowed with method only"),
        ({"source": "/nowhere", "sparsity": 0.9}, r"sparsity=0\.9: allowed with method only"),
        ({"source": "/nowhere", "method": "svg2"}, "method=svg2: allowed is one of source and"),
        ({"method": "svg2", "dense_layers": 4}, r"dense_layers=4: .* from 0 to the model's 3"),
        ({"method": "svg2", "dense_layers": -1}, "dense_layers=-1"),
        ({"method": "svg2", "dense_steps": -1}, "dense_steps=-1: allowed is an integer of at"),
        ({"method": "svg2", "dense_steps": 0.3}, r"dense_steps=0\.3: allowed is an integer"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_no_trace(arguments, said):
    pipe = stock()
    with pytest.raises(ValueError, match=said) as error:
        attach(pipe, **arguments)
    assert "\n" not in str(error.value) and "; " in str(error.value)
    detach(attach(pipe, None))
