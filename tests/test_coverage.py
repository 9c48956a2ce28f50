"""How much of the zoos' squeeze-and-excitation is fused: what the committed table says holds, and doesn't fall.

`python -m bench coverage` writes the table. Here a sample of models, one or more for every class in it, is looked at
again; the slow test looks at all.
"""

import importlib.util
import json

import pytest
import torch
from torch import nn

from bench import coverage
from tests import support  # noqa: F401  (makes torchvision importable)

COMMITTED = json.loads(coverage.RESULT.read_text())
# Small models, so that every class of the table is in one of them at least; a test says so.
SAMPLE = {
    "timm": [
        "seresnet50", "legacy_seresnet18", "legacy_seresnet50", "repvgg_d2se",
        "test_byobnet", "legacy_seresnext26_32x4d", "legacy_senet154", "tresnet_m",
        "efficientnet_b0", "mobilenetv3_small_050", "ese_vovnet19b_dw", "ese_vovnet57b", "rexnet_100", "hgnet_tiny",
        "ghostnet_050",
        "regnety_002", "fastvit_t8", "fastvit_mci0", "mobileone_s4", "gcvit_xxtiny", "coatnet_pico_rw_224",
        "seresnet18", "resnet51q", "ecaresnet26t", "skresnet18", "resnest14d", "gcresnext26ts", "seresnext26ts",
        "bat_resnext26ts", "nf_seresnet26",
    ],
    "torchvision": ["mobilenet_v3_small", "efficientnet_b0", "quantized_mobilenet_v3_large"],
    "pytorchcv": [
        "seresnet10", "sepreresnet10", "seresnext50_32x4d", "senet16", "mobilenetv3_small_w7d20", "ghostnet",
        "cgnet_cityscapes", "sinet_cityscapes", "fastseresnet101b", "cbam_resnet18", "bam_resnet18", "sknet50",
        "dicenet_wd5", "fishnet99",
        "diaresnet10", "resattnet56", "resnesta18",
    ],
}  # fmt: skip


def found(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} isn't installed")
    if library not in COMMITTED["libraries"]:
        pytest.skip(f"the committed table holds no {library}: run `python -m bench coverage --library {library}`")


def same_version(library: str) -> bool:
    return importlib.metadata.version(library) == COMMITTED["libraries"][library]["version"]


@pytest.fixture(scope="module")
def looked() -> dict[str, tuple[dict[str, coverage.Library], list[coverage.Row]]]:
    """The sample, looked at once."""
    there = [name for name in SAMPLE if importlib.util.find_spec(name) is not None]
    return {name: coverage.scan([name], SAMPLE[name]) for name in there}


def test_the_goal_is_met() -> None:
    share = coverage.share(COMMITTED["rows"])
    assert share["squeeze_excite"][0] > 18_000
    assert {"bam", "cbam", "eca", "residual_attention", "selective_kernel", "split_attention"} <= set(share)
    assert all(fused >= coverage.GOAL * total for total, fused in share.values())


def test_the_table_is_that_of_the_figures() -> None:
    assert coverage.RESULT.with_suffix(".md").read_text() == coverage.render(COMMITTED)


def test_figures_add_up() -> None:
    for row in COMMITTED["rows"]:
        refused = sum(row["refused"].values())
        assert row["fused"] + refused == (0 if row["part"] == "not yet" else row["instances"]), row
        assert all(reason for reason in row["refused"])
    for name, library in COMMITTED["libraries"].items():
        rows = [r for r in COMMITTED["rows"] if r["library"] == name and r["part"] == "gate"]
        assert sum(gates for gates, _, _ in library["models"].values()) == sum(r["instances"] for r in rows)
        assert sum(fused for _, fused, _ in library["models"].values()) == sum(r["fused"] for r in rows)


@pytest.mark.parametrize("library", SAMPLE)
def test_a_sample_is_fused_as_the_table_says(library: str, looked: dict) -> None:
    found(library)
    ((found_library, _),) = [(looked[library][0][library], looked[library][1])]
    assert found_library.unbuilt == {}
    assert found_library.looked_at == len(SAMPLE[library])
    for name, (gates, fused, tails) in found_library.models.items():
        was = COMMITTED["libraries"][library]["models"].get(name)
        assert was is None or (fused, tails) >= tuple(was[1:]), name
        if was is not None and same_version(library):
            assert gates == was[0], name


@pytest.mark.parametrize("library", SAMPLE)
def test_the_sample_holds_every_class(library: str, looked: dict) -> None:
    found(library)
    seen = {(row.cls, row.part) for row in looked[library][1]}
    rows = [r for r in COMMITTED["rows"] if r["library"] == library and r["part"] != "not yet"]
    missing = {(r["cls"], r["part"]) for r in rows if r["fused"]} - seen
    assert not missing


def test_a_class_without_a_rule_is_listed() -> None:
    """And a gate that isn't fused makes the share fall: the figures aren't what the table wants to see."""
    found("timm")
    from timm.layers import GlobalContext, SEModule

    model = nn.Sequential(SEModule(16), GlobalContext(16), SEModule(16, act_layer=nn.Tanh))
    seen = coverage.look(model)
    assert [(mechanism, part, reason is None) for mechanism, _, part, reason in seen] == [
        ("squeeze_excite", "gate", True), ("squeeze_excite", "gate", False), ("GCNet", "not yet", True),
    ]  # fmt: skip


def test_models_without_weights() -> None:
    built = coverage.build(lambda: nn.Linear(3, 3))
    assert built.weight.is_meta

    def computes() -> nn.Module:
        linear = nn.Linear(3, 3)
        assert float(linear.weight.sum()) == float(linear.weight.sum())
        return linear

    assert not coverage.build(computes).weight.is_meta
    assert torch.get_default_device().type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("library", SAMPLE)
def test_the_whole_table(library: str) -> None:
    """Every model: per class at least as many instances are fused as the table says, and the share is met."""
    found(library)
    _, rows = coverage.scan([library])
    now = {(r.mechanism, r.cls, r.part): r for r in rows}
    for row in COMMITTED["rows"]:
        if row["library"] == library and row["part"] != "not yet" and same_version(library):
            assert now[row["mechanism"], row["cls"], row["part"]].fused >= row["fused"], row["cls"]
