"""Gossamer turns a pretrained dense video diffusion transformer into a sparse one.

attach(pipe, path) puts a trained model's sparse attention into a diffusers pipeline or transformer,
attach(pipe, method="svg2", sparsity=0.9) a published method without training, detach(pipe) takes it
out again; hit_rates(pipe) tells how well clusters lasted; load_pipeline(path) opens what a run
exported.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "attach": "gossamer.sparse.attach",
    "detach": "gossamer.sparse.attach",
    "hit_rates": "gossamer.sparse.attach",
    "load_pipeline": "gossamer.train.pipeline",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
