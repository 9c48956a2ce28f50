"""`python -m bench coverage`: what `fuse_` converts of every model of timm, torchvision and pytorchcv, as a table.

Models are built on the meta device, without weights. Rows are classes of gates, and of parents whose residual add and
activation go with a gate: how many there are in all models together, how many are fused, and why the others aren't.
Classes of mechanisms that have no rule yet are counted as well. Writes bench/results/coverage.json and coverage.md.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fused_attn import BLOCKS, fuse_
from fused_attn.convert import known
from fused_attn.plan import Fused

from .measure import command_line, log, provenance
from .support import ROOT, importable, progress, write_json

RESULT = ROOT / "bench" / "results" / "coverage.json"
GOAL = 0.99  # the least share of a mechanism's gates that are fused

# Classes of mechanisms that have no rule: each is one gate. With a rule, a class moves to the table proper by itself.
NOT_YET = {
    "timm.layers.eca.EcaModule": "ECA",
    "timm.layers.eca.CecaModule": "ECA",
    "timm.layers.cbam.CbamModule": "CBAM",
    "timm.layers.cbam.LightCbamModule": "CBAM",
    "timm.layers.split_attn.SplitAttn": "ResNeSt",
    "timm.layers.global_context.GlobalContext": "GCNet",
    "timm.layers.gather_excite.GatherExcite": "GatherExcite",
    "timm.layers.non_local_attn.NonLocalAttn": "non-local",
    "timm.layers.non_local_attn.BatNonLocalAttn": "non-local",
    "timm.models.csatv2.SpatialAttention": "spatial attention",
    "pytorchcv.models.cbamresnet.CbamBlock": "CBAM",
    "pytorchcv.models.bamresnet.BamBlock": "BAM",
    "pytorchcv.models.sknet.SKConvBlock": "SK",
    "pytorchcv.models.common.att.SABlock": "ResNeSt",
    "pytorchcv.models.resattnet.AttBlock": "Residual Attention",
    "pytorchcv.models.diaresnet.DIAAttention": "DIA",
    "pytorchcv.models.danet.PosAttBlock": "dual attention",
    "pytorchcv.models.danet.ChaAttBlock": "dual attention",
    "pytorchcv.models.bisenet.AttentionRefinementBlock": "BiSeNet",
}


@dataclass
class Row:
    """One class in one library: instances in all its models, `models` of them holding one."""

    library: str
    mechanism: str
    cls: str
    part: str
    models: int = 0
    instances: int = 0
    fused: int = 0
    refused: dict[str, int] = field(default_factory=dict)


@dataclass
class Library:
    """A library's part of the result. models: name -> gates, fused gates, fused parents, of those that hold a gate."""

    version: str
    looked_at: int = 0
    models: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    unbuilt: dict[str, str] = field(default_factory=dict)


# What a file of timm's must say to build a gate by itself: timm's names for them, or the pooling of one of its own.
_NAMES_A_GATE = re.compile(
    r"SqueezeExcite|SEModule|EffectiveSE|EseModule|\bcreate_attn\b|\bget_attn\b|se_layer|SplitAttn|SelectiveKernel|"
    r"GlobalContext|EcaModule|CbamModule|GatherExcite|NonLocal|AdaptiveAvgPool"
)


def _of_timm() -> dict[str, Callable[[], nn.Module]]:
    """Without the models of files that name no gate, and that import from no file of models that does."""
    timm = importlib.import_module("timm")
    registry = importlib.import_module("timm.models._registry")
    files = {path.stem: path.read_text() for path in Path(timm.__file__).parent.glob("models/[!_]*.py")}
    files |= {path.stem: path.read_text() for path in Path(timm.__file__).parent.glob("models/_efficientnet_*.py")}
    imports = {name: set(re.findall(r"from \.(\w+) import", text)) for name, text in files.items()}
    naming = {name for name, text in files.items() if _NAMES_A_GATE.search(text)}
    while more := {name for name in files if imports[name] & naming} - naming:
        naming |= more
    names = [name for name in timm.list_models() if registry._model_to_module[name] in naming]
    return {name: lambda name=name: timm.create_model(name) for name in names}


def _of_torchvision() -> dict[str, Callable[[], nn.Module]]:
    models = importlib.import_module("torchvision").models

    def build(name: str) -> nn.Module:
        built: nn.Module
        try:
            built = models.get_model(name, weights=None, weights_backbone=None)
        except TypeError:  # only models on a backbone take weights for it
            built = models.get_model(name, weights=None)
        return built

    return {name: lambda name=name: build(name) for name in models.list_models()}


def _of_pytorchcv() -> dict[str, Callable[[], nn.Module]]:
    provider = importlib.import_module("pytorchcv.model_provider")
    return {name: lambda name=name: provider.get_model(name) for name in provider._models}


LIBRARIES: dict[str, Callable[[], dict[str, Callable[[], nn.Module]]]] = {
    "timm": _of_timm,
    "torchvision": _of_torchvision,
    "pytorchcv": _of_pytorchcv,
}


class _Undrawn(TorchFunctionMode):
    """Initialisation in place, of tensors that have no numbers, is left out: it would take longer than all the rest."""

    DRAWS = frozenset(
        getattr(torch.Tensor, name)
        for name in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "sub_", "div_", "clamp_", "fill_", "zero_")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.DRAWS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A model without weights; with them where its constructor computes with what it makes. Raises what it raises."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"), _Undrawn():
                return make()
        except Exception:
            return make()


def mechanism_of(module: nn.Module) -> str:
    """The name of the block whose rule is known for a module, or that a tail's gate belongs to."""
    rule = known(module)
    if rule is not None and rule.tail is not None:
        return mechanism_of(rule.tail.gates(module)[0])
    block = next((b for b in BLOCKS.values() if rule in b.rules or type(module) is b.module), None)
    return block.name if block else "squeeze_excite"  # what is read from its source is squeeze-and-excitation


def look(model: nn.Module) -> list[tuple[str, str, str, str | None]]:
    """Mechanism, class, part and reason of refusal (or None) of every gate and parent of a model, which gets fused;
    part is "not yet" where there is no rule."""
    report = fuse_(model)
    found = []
    for row in report.rows:
        module = model.get_submodule(row.name)
        if row.kind != "plain":
            found.append((mechanism_of(module), row.cls, row.kind, row.reason))
    for module in model.modules():
        cls = module.original if isinstance(module, Fused) else type(module)
        where = f"{cls.__module__}.{cls.__qualname__}"
        if where in NOT_YET and not isinstance(module, Fused) and known(module) is None:
            found.append((NOT_YET[where], where, "not yet", None))
    return found


def scan(libraries: Iterable[str], names: Sequence[str] | None = None) -> tuple[dict[str, Library], list[Row]]:
    """Looks at every model of the libraries, or at those named."""
    rows: dict[tuple[str, str, str, str], Row] = {}
    found: dict[str, Library] = {}
    for library in libraries:
        makers = LIBRARIES[library]()
        chosen = list(makers) if names is None else [n for n in makers if n in names]
        here = found[library] = Library(importlib.metadata.version(library))
        for name in progress(chosen, library):
            try:
                model = build(makers[name])
            except Exception as error:
                here.unbuilt[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
                continue
            here.looked_at += 1
            seen = look(model)
            counts: Counter[tuple[str, str, str, str]] = Counter()
            for mechanism, cls, part, reason in seen:
                key = (library, mechanism, cls, part)
                counts[key] += 1
                row = rows.setdefault(key, Row(*key))
                row.instances += 1
                row.fused += part != "not yet" and reason is None
                if reason is not None:
                    row.refused[reason] = row.refused.get(reason, 0) + 1
            for key in counts:
                rows[key].models += 1
            gates = [reason for _, _, part, reason in seen if part == "gate"]
            if gates:
                tails = sum(part == "tail" and reason is None for _, _, part, reason in seen)
                here.models[name] = (len(gates), gates.count(None), tails)
    return found, sorted(rows.values(), key=lambda r: (r.library, r.part, r.mechanism, r.cls))


def share(rows: Iterable[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """By mechanism, how many gates there are, and how many are fused."""
    found: dict[str, tuple[int, int]] = {}
    for r in rows:
        if r["part"] == "gate":
            total, fused = found.get(r["mechanism"], (0, 0))
            found[r["mechanism"]] = total + r["instances"], fused + r["fused"]
    return dict(sorted(found.items()))


def render(content: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# What `fuse_` converts",
        "",
        "Generated by `python -m bench coverage`: every model of the libraries, built on the meta device.",
        "Not looked at: timm's models whose files name no gate.",
        "",
        "| mechanism | gates | fused | |",
        "|---|---|---|---|",
        *(
            f"| {name} | {total} | {fused} | {100 * fused / total:.2f} % |"
            for name, (total, fused) in share(content["rows"]).items()
        ),
        "",
        "| library | version | models looked at | of them with a gate | could not be built |",
        "|---|---|---|---|---|",
    ]
    for name, library in content["libraries"].items():
        lines.append(
            f"| {name} | {library['version']} | {library['looked_at']} | {len(library['models'])} "
            f"| {len(library['unbuilt'])} |"
        )
    lines += [
        "", "A gate is one instance in one model; a tail is the residual add and activation of its parent.",
        "", "| mechanism | class | part | models | instances | fused | refused |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in content["rows"]:
        why = "; ".join(f"{count}: {reason}" for reason, count in r["refused"].items())
        cells = (r["mechanism"], f"`{r['cls']}`", r["part"], r["models"], r["instances"], r["fused"], why)
        if r["part"] != "not yet":
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Gates that have no rule yet:", "", "| mechanism | class | models | instances |", "|---|---|---|---|"]
    for r in content["rows"]:
        if r["part"] == "not yet":
            lines.append(f"| {r['mechanism']} | `{r['cls']}` | {r['models']} | {r['instances']} |")
    reasons: Counter[str] = Counter(r for library in content["libraries"].values() for r in library["unbuilt"].values())
    if reasons:
        lines += ["", "Not built:", *(f"- {count} models: {reason}" for reason, count in reasons.most_common())]
    return "\n".join(lines) + "\n"


def parser(add: Any) -> argparse.ArgumentParser:
    """The options of `python -m bench coverage`."""
    p: argparse.ArgumentParser = add(
        "coverage", help="what fuse_ converts of every model of timm, torchvision, pytorchcv"
    )
    p.add_argument(
        "--library",
        action="append",
        choices=list(LIBRARIES),
        help="only this one, beside what the file says of others; may be repeated",
    )
    p.add_argument("--out", type=Path, default=RESULT, help="the JSON file; the table goes beside it, as .md")
    return p


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `python -m bench coverage`. 1: less is fused than the goal; 2: a library isn't installed."""
    libraries = options.library or list(LIBRARIES)
    importable("torchvision")  # which the others import
    missing = [name for name in libraries if not importable(name)]
    if missing:
        log(f"not installed: {', '.join(missing)}")
        return 2
    found, rows = scan(libraries)
    content: dict[str, Any] = {
        "kind": "coverage",
        "provenance": provenance("cpu", command_line("bench", arguments)),
        "libraries": {name: asdict(library) for name, library in found.items()},
        "rows": [asdict(row) for row in rows],
    }
    if options.library and options.out.exists():
        old = json.loads(options.out.read_text())
        every = old["libraries"] | content["libraries"]
        content["libraries"] = {name: every[name] for name in LIBRARIES if name in every}
        content["rows"] += [row for row in old["rows"] if row["library"] not in libraries]
        content["rows"].sort(key=lambda row: (row["library"], row["part"], row["mechanism"], row["cls"]))
    write_json(options.out, content)
    text = render(content)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return int(any(fused < GOAL * total for total, fused in share(content["rows"]).values()))
