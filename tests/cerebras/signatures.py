"""Binds every call that engines/cerebras.py makes to the package to the signature that the
installed package has: prints one line a call, and fails where one does not fit."""

import ast
import inspect
from importlib import import_module
from pathlib import Path

import cerebras.pytorch as cstorch
import torch
from cerebras.appliance.cluster.config import get_cs_cluster_config
from cerebras.pytorch.backend import get_backend_args
from cerebras.pytorch.distributed.cluster_resolver import ClusterSpec

from engines.cerebras import CANCELLING

SOURCE = Path(__file__).resolve().parents[2] / "engines" / "cerebras.py"
# What the names of that file stand for there
MEANS = {
    "cstorch": cstorch,
    "schedulers": cstorch.optim.lr_scheduler,
    "schedule": cstorch.utils.data.utils.Schedule,
    "distributed": cstorch.distributed,
    "self.optimizer": cstorch.optim.AdamW,
    "self.schedule": cstorch.optim.lr_scheduler.SequentialLR,
    "self.scaler": cstorch.amp.GradScaler,
    "workers": ClusterSpec,
    "get_cs_cluster_config": get_cs_cluster_config,
}


def resolve(dotted: str) -> object | None:
    if "(" in dotted:  # a call of what a call returned, which is PyTorch's
        return None
    for name in sorted(MEANS, key=len, reverse=True):
        if dotted == name or dotted.startswith(name + "."):
            found = MEANS[name]
            for part in dotted[len(name) :].split(".")[1:]:
                found = getattr(found, part)
            return found
    return None


def parameters(called: object, call: ast.Call) -> inspect.Signature:
    if called is cstorch.backend:  # takes anything; the backend that it makes does not
        taken = list(get_backend_args(call.args[0].value).values())[1:]
        return inspect.Signature(taken)
    signature = inspect.signature(called)
    first = next(iter(signature.parameters), None)
    if first == "self" and not inspect.isclass(called):
        return signature.replace(parameters=list(signature.parameters.values())[1:])
    return signature


count = 0
for call in ast.walk(ast.parse(SOURCE.read_text())):
    if not isinstance(call, ast.Call):
        continue
    called = resolve(ast.unparse(call.func))
    if called is None:
        continue
    # what is unpacked is known to the code alone: ClusterConfig's keys come from its own fields
    starred = any(isinstance(a, ast.Starred) for a in call.args)
    names = [keyword.arg for keyword in call.keywords if keyword.arg is not None]
    signature = parameters(called, call)
    bind = signature.bind_partial if starred else signature.bind
    bind(*(a for a in call.args if not isinstance(a, ast.Starred)), **dict.fromkeys(names))
    count += 1
    print(f"{ast.unparse(call.func)}: fits {called}")
for name in CANCELLING:
    inspect.signature(import_module(name).on_sigint).bind(None)
assert torch.__version__.startswith("2.4.0") and count > 20, count
