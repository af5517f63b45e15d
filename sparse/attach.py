"""Put gossamer's attention into a diffusers transformer, and take it out again."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from math import gcd
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.sparse.attention import DenseAttention, SparseAttention, SparseMethod
from gossamer.sparse.construct import construct
from gossamer.sparse.install import RECORD, Attachment, install
from gossamer.sparse.methods import method_named
from gossamer.sparse.sequence import SequenceParallel

CONFIG_NAME = "sparse_attention_config.json"
STATE_NAME = "sparse_attention.safetensors"
FORMAT_VERSION = 1

logger = logging.getLogger(__name__)


def attach(
    target: Any,
    source: SparseMethod | str | Path | None = None,
    *,
    method: str | None = None,
    sparsity: float | None = None,
    dense_steps: int = 0,
    dense_layers: int = 0,
) -> Any:
    """Replace the self-attention of a transformer, or of a pipeline's, and return the target.

    Give either `method`, a published method by name (sparge, svg1, svg2 or svg_ear) at `sparsity`
    (0.9 if left out), or `source`: a SparseMethod, a folder that holds an exported mask policy, or
    None for dense attention through gossamer's processors (teachers and controls). The first
    `dense_steps` steps of each run of the pipeline and the first `dense_layers` self-attentions
    stay dense; they do not count in the sparsity. A second transformer (Wan 2.2's `transformer_2`)
    sees late steps only: where the pipeline numbers its steps, those below `dense_steps` are the
    run's first, of which it may see none; elsewhere they are the first that it sees itself.

    Raises ValueError for an unknown method or model family, numbers out of range, a model that
    already carries an attachment, or a policy of another model.
    """
    model = transformer_of(target)
    if RECORD in model.__dict__:
        raise ValueError("transformer: it already has gossamer's attention; call detach first")
    if method is not None:
        if source is not None:
            raise ValueError(
                f"method={method}: allowed is one of source and method; leave one of them out"
            )
        source = method_named(method, 0.9 if sparsity is None else sparsity)
    elif sparsity is not None:
        raise ValueError(
            f"sparsity={sparsity}: allowed with method only, a policy or SparseMethod has its own; "
            "leave it out or give e.g. method='svg2'"
        )
    _check_dense(model, dense_steps, dense_layers)
    if isinstance(source, str | Path):
        loaded, state = load_policy(source)
        install(model, family_of(model), lambda heads, dim: SparseAttention(loaded, heads, dim))
        try:
            load_mask_state(model, state)
        except ValueError:
            detach(model)
            raise
    elif source is None:
        install(model, family_of(model), lambda heads, dim: DenseAttention())
    else:
        install(model, family_of(model), lambda heads, dim: SparseAttention(source, heads, dim))
    record: Attachment = model.__dict__[RECORD]
    record.dense_steps, record.dense_layers = dense_steps, dense_layers
    return target


def detach(target: Any) -> Any:
    """Restore the processors that the model had before `attach`, and return the target.

    Where clusters went on from step to step the log says their hit rate (`hit_rates`).
    """
    model = transformer_of(target)
    if rates := hit_rates(model):
        q, k = (100 * torch.stack([*rates.values()]).mean((0, 2))).tolist()
        logger.info("clusters: from step to step %.1f %% of q, %.1f %% of k tokens stayed", q, k)
    record: Attachment = model.__dict__.pop(RECORD)
    for hook in record.hooks:
        hook.remove()
    for name in ("cache_context", "save_pretrained"):
        model.__dict__.pop(name, None)
    for name, original in record.originals.items():
        layer = model.get_submodule(name)
        layer._modules.pop("processor", None)
        layer.processor = original
    return target


def attentions(target: Any) -> dict[str, Any]:
    """Return layer name -> attention module (SparseAttention or DenseAttention), in layer order."""
    model = transformer_of(target)
    if RECORD not in model.__dict__:
        raise ValueError("transformer: it has no gossamer attention; call attach first")
    return model.__dict__[RECORD].attentions


def hit_rates(target: Any) -> dict[str, Tensor]:
    """Return layer name -> share of q and of k tokens that stayed in their cluster, fp32 [2, H].

    Means over the steps since `attach` that clustered from the codebook of the step before (SVG2,
    section 4.3); layers without such steps are left out. Only reading it waits for the GPU.
    """
    found = {
        name: attention.codebooks.mean_hit_rate
        for name, attention in attentions(target).items()
        if getattr(attention, "codebooks", None) is not None
    }
    return {name: rate.cpu() for name, rate in found.items() if rate is not None}


def mask_parameters(target: Any) -> dict[str, nn.Parameter]:
    """Return the trainable mask parameters as `<layer>.<name>` -> parameter; often none."""
    return {
        f"{layer}.{name}": parameter
        for layer, attention in attentions(target).items()
        for name, parameter in attention.named_parameters()
    }


def share_sequence(target: Any, sequence: SequenceParallel) -> None:
    """Share the tokens and heads of an attached model among the processes of a group.

    Raises ValueError for a family that cannot, heads that do not divide, or a mask of all heads.
    """
    model = transformer_of(target)
    family = family_of(model)
    heads = next(layer.heads for _, layer in family.self_attentions(model))
    first = next(iter(attentions(model).values()))
    check_shared_sequence(model, sequence.size, heads, getattr(first, "policy", None))
    record: Attachment = model.__dict__[RECORD]
    record.hooks += family.share_tokens(model, sequence)
    record.context.sequence = sequence


def check_shared_sequence(model: nn.Module, size: int, heads: int, policy: Any) -> None:
    """Refuse a family whose tokens cannot be shared, and heads that `size` does not divide.

    And a policy (or its settings) with one budget for all heads, of which a process sees its own.
    """
    name = type(model).__name__
    if size > 1 and not hasattr(family_of(model), "share_tokens"):
        raise ValueError(f"sequence_parallel={size}: allowed is 1 for {name}; set it to 1")
    if size > 1 and getattr(policy, "scope", None) == "layer":
        raise ValueError(
            f"policy.scope=layer: allowed is row or head with sequence_parallel={size}, where no "
            "process sees all heads of a layer; set policy.scope=head"
        )
    if heads % size:
        raise ValueError(
            f"sequence_parallel={size}: allowed is a divisor of the {heads} heads of {name}; "
            f"set one, e.g. {gcd(heads, size)}"
        )


@contextmanager
def attending_densely(target: Any) -> Iterator[None]:
    """Let an attached model attend densely inside the block; its own attention comes back after."""
    model = transformer_of(target)
    own = attentions(model)
    processors = {name: model.get_submodule(name).processor for name in own}
    for processor in processors.values():
        processor.attention = DenseAttention()
    try:
        yield
    finally:
        for name, processor in processors.items():
            processor.attention = own[name]


def mask_state(target: Any) -> dict[str, Tensor]:
    """Return the mask parameters as `<layer>.<name>` -> tensor."""
    return {
        f"{layer}.{name}": tensor.detach()
        for layer, attention in attentions(target).items()
        for name, tensor in attention.state_dict().items()
    }


def load_mask_state(target: Any, state: dict[str, Tensor]) -> None:
    """Load what `mask_state` returned; ValueError when it is of another model, or out of range."""
    own = mask_state(target)
    odd = sorted(own.keys() ^ state.keys())
    odd += sorted(n for n in own.keys() & state.keys() if own[n].shape != state[n].shape)
    if odd:
        raise ValueError(
            f"mask policy={odd[0]}: allowed is a policy made for this model "
            f"({len(own)} tensors); calibrate this model or load the one it was made for"
        )
    trained = mask_parameters(target)
    for name, tensor in state.items():  # a limit of a filter may be -inf
        if not (tensor.isfinite() if name in trained else ~tensor.isnan()).all():
            raise ValueError(
                f"mask policy={name}: allowed are finite numbers; the file is damaged, export again"
            )
    before = {name: tensor.clone() for name, tensor in own.items()}
    for name, tensor in own.items():
        tensor.copy_(state[name])
    for layer, attention in attentions(target).items():
        try:
            _check_numbers(attention)
        except ValueError as error:
            for name, tensor in own.items():
                tensor.copy_(before[name])
            raise ValueError(f"mask policy={layer}: {error}") from error


def _check_numbers(attention: nn.Module) -> None:
    """Raise the ValueError of the setter of each part whose numbers are out of range."""
    for part, setter, names in (
        ("policy", "set_budget", ("k", "p")),
        ("layout", "set_choice", ("choice",)),
        ("compensation", "set_limit", ("skip_below",)),
    ):
        found = getattr(attention, part, None)
        if hasattr(found, setter):
            getattr(found, setter)(*(getattr(found, name) for name in names))


def save_policy(folder: str | Path, spec: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write the mask policy beside a transformer: `spec` as JSON, `state` as safetensors."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, folder / STATE_NAME)
    text = json.dumps({"format_version": FORMAT_VERSION, **spec}, indent=2)
    (folder / CONFIG_NAME).write_text(text + "\n")


def load_policy(folder: str | Path) -> tuple[SparseMethod, dict[str, Tensor]]:
    """Read a mask policy; ValueError when a file is missing, damaged or of a newer format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (CONFIG_NAME, STATE_NAME):
        if not (folder / name).is_file():
            raise ValueError(
                f"path={folder}: allowed is a folder with {CONFIG_NAME} and {STATE_NAME}, "
                f"{name} is missing; export with `gossamer export`"
            )
    try:
        spec, state = json.loads((folder / CONFIG_NAME).read_text()), load_file(folder / STATE_NAME)
        version, method = spec["format_version"], spec["method"]
    except (json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"path={folder}: allowed is a whole {CONFIG_NAME} and {STATE_NAME}; "
            f"they are damaged, export again: {error}"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format_version={version}: allowed is {FORMAT_VERSION}; "
            "install the gossamer version that wrote this policy"
        )
    return method_from_spec(method), state


def method_from_spec(spec: dict[str, Any]) -> SparseMethod:
    """Build a SparseMethod from its config nodes, one for each of its fields."""
    names = [field.name for field in fields(SparseMethod)]
    if not {"layout", "estimator", "policy", "compensation"} <= spec.keys() <= set(names):
        raise ValueError(f"method={sorted(spec)}: allowed is {', '.join(names)}; correct the names")
    return SparseMethod(**construct(spec))


def transformer_of(target: Any) -> nn.Module:
    """Return the pipeline's transformer, or the model itself, out of torch.compile's wrapper."""
    if not isinstance(target, nn.Module):
        if getattr(target, "transformer_2", None) is not None:
            raise ValueError(
                "pipeline: it has two transformers, and one would stay as it is; give "
                "pipe.transformer and pipe.transformer_2 one after the other"
            )
        target = target.transformer
    return getattr(target, "_orig_mod", target)


def families() -> dict[str, ModuleType]:
    """Return the class name of each model family that is known -> its module of sparse/models/."""
    names = sorted(p.stem for p in Path(__file__).with_name("models").glob("*.py"))
    names.remove("context")
    modules = [import_module(f"gossamer.sparse.models.{name}") for name in names]
    return {module.MODEL.__name__: module for module in modules}


def family_of(model: nn.Module) -> ModuleType:
    """Return the module of sparse/models/ whose MODEL the model is an instance of."""
    known = families()
    for family in known.values():
        if isinstance(model, family.MODEL):
            return family
    raise ValueError(
        f"model={type(model).__name__}: allowed is {' or '.join(known)}; "
        "see docs/adding_a_model.md to add a family"
    )


def _check_dense(model: nn.Module, dense_steps: int, dense_layers: int) -> None:
    layers = sum(1 for _ in family_of(model).self_attentions(model))
    for name, count, most in (
        ("dense_steps", dense_steps, None),
        ("dense_layers", dense_layers, layers),
    ):
        if not isinstance(count, int) or count < 0 or (most is not None and count > most):
            limit = "of at least 0" if most is None else f"from 0 to the model's {most} layers"
            raise ValueError(f"{name}={count}: allowed is an integer {limit}; e.g. {name}=1")
