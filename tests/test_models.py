"""Laws of the networks: shapes, gradients, the papers' sizes, and how names resolve."""

import builtins
import math

import pytest
import torch
from torch import nn

from dsa_hw.errors import UserError
from dsa_hw.models import CifarResNet, default_input_shape, resolve_model
from dsa_hw.models.registry import OWN_MODELS

DEEP_OR_WIDE = ("cifar_resnet110", "cifar_resnet18")  # same code as resnet20, slower
FAST_OWN = [name for name in OWN_MODELS if name not in DEEP_OR_WIDE]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def tiny(num_classes: int = 5) -> nn.Module:
    return nn.Linear(2, num_classes)


def seven_outputs() -> nn.Module:
    return nn.Linear(3, 7)


def not_a_model(num_classes: int = 5) -> str:
    return "model"


@pytest.mark.parametrize("name", list(OWN_MODELS))
def test_own_networks_map_images_to_logits(name: str) -> None:
    model = resolve_model(name, num_classes=7).eval()
    with torch.no_grad():
        assert model(torch.randn(1, *default_input_shape(name))).shape == (1, 7)


@pytest.mark.parametrize("name", FAST_OWN)
def test_gradients_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = resolve_model(name, num_classes=7)
    model(torch.randn(2, *default_input_shape(name))).square().sum().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.any(), path


@pytest.mark.parametrize(
    ("name", "paper_millions"),
    [
        ("cifar_resnet20", 0.27),  # He et al. 2016, table 6
        ("cifar_resnet32", 0.46),
        ("cifar_resnet56", 0.85),
        ("cifar_resnet110", 1.7),
    ],
)
def test_resnets_have_the_papers_size(name: str, paper_millions: float) -> None:
    # two projections (16x32 + 32x64 weights, 192 of batch norm) come on top of the paper's
    # parameter-free shortcuts; the paper rounds to two digits: half a unit of the second
    rounding = 0.5 * 10 ** (math.floor(math.log10(paper_millions)) - 1) * 1e6
    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    count = parameters(resolve_model(name)) - projections
    assert count == pytest.approx(paper_millions * 1e6, abs=rounding)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("cifar_resnet20", 20),
        ("cifar_resnet32", 32),
        ("cifar_resnet56", 56),
        ("cifar_resnet110", 110),
        ("cifar_resnet18", 18),
        ("glyphs_resnet", 14),
    ],
)
def test_a_resnets_name_counts_its_layers(name: str, layers: int) -> None:
    """Projections do not count, as in the paper."""
    weighted = [
        module
        for path, module in resolve_model(name).named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in path
    ]
    assert len(weighted) == layers


def test_mobilenetv2_has_torchvisions_size() -> None:
    """Strides carry no parameters, so the CIFAR variant has exactly as many."""
    ours = resolve_model("cifar_mobilenetv2", num_classes=10)
    assert parameters(ours) == parameters(resolve_model("mobilenet_v2", num_classes=10))


def test_convolutions_start_with_kaiming_fan_out_spread() -> None:
    torch.manual_seed(0)
    model = resolve_model("cifar_resnet18")
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            # the standard error of a spread over 10,000 normal weights is 0.7%
            expected = math.sqrt(2 / fan_out)
            assert module.weight.std().item() == pytest.approx(expected, rel=0.04), path


@pytest.mark.parametrize("name", list(OWN_MODELS))
def test_batch_norm_scales_start_at_one(name: str) -> None:
    norms = [m for m in resolve_model(name).modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


def test_widths_and_blocks_must_match() -> None:
    with pytest.raises(ValueError, match="one width a stage"):
        CifarResNet((2, 2), (8, 16, 32), 10)


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet10t", f"{__name__}:tiny"])
def test_num_classes_sets_the_head(name: str) -> None:
    layers = [m for m in resolve_model(name, num_classes=7).modules() if isinstance(m, nn.Linear)]
    assert layers[-1].out_features == 7


def test_num_classes_left_out_keeps_the_models_own() -> None:
    heads = {"glyphs_resnet": 36, "cifar_resnet20": 10, "resnet18": 1000, f"{__name__}:tiny": 5}
    for name, outputs in heads.items():
        layers = [m for m in resolve_model(name).modules() if isinstance(m, nn.Linear)]
        assert layers[-1].out_features == outputs, name


def test_googlenet_has_one_output_in_training() -> None:
    model = resolve_model("googlenet", num_classes=5)
    assert model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cifar_vgg16", (3, 32, 32)),
        ("glyphs_resnet", (3, 24, 24)),
        ("resnet18", (3, 224, 224)),
        ("inception_v3", (3, 299, 299)),
        ("timm:inception_v4", (3, 299, 299)),
        (f"{__name__}:tiny", (3, 224, 224)),
    ],
)
def test_default_input_shape(name: str, shape: tuple[int, int, int]) -> None:
    assert default_input_shape(name) == shape


def test_a_factory_need_not_take_num_classes() -> None:
    """Then it has its own number of outputs."""
    model = resolve_model(f"{__name__}:seven_outputs", num_classes=5)
    assert model(torch.zeros(2, 3)).shape == (2, 7)


# errors


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet19", ["'resnet19'", "resnet18"]),
        ("cifar_resnet57", ["cifar_resnet56"]),
        ("timm:resnet19d", ["timm:resnet18d"]),
        ("zzz", ["unknown model", "cifar_resnet20", "package.module:factory"]),
        ("fcn_resnet50", ["unknown model", "classification"]),
        ("no_such_package.models:make", ["no_such_package.models", "PYTHONPATH"]),
        (f"{__name__}:missing", ["missing", "not a factory"]),
        (f"{__name__}:FAST_OWN", ["FAST_OWN", "list"]),
        (f"{__name__}:not_a_model", ["str", "torch.nn.Module"]),
    ],
)
def test_wrong_names_are_explained(name: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve_model(name)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["cifar_resnet20", f"{__name__}:tiny"])
def test_pretrained_is_refused_where_there_are_no_weights(name: str) -> None:
    with pytest.raises(UserError, match="no pretrained weights"):
        resolve_model(name, pretrained=True)


def test_missing_timm_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_timm(name: str, *args: object) -> object:
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return real_import(name, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(builtins, "__import__", without_timm)
    for ask in (resolve_model, default_input_shape):
        with pytest.raises(UserError, match=r"pip install timm"):
            ask("timm:resnet10t")


def test_failed_download_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"weights of resnet18: no route to host\. Check"):
        resolve_model("resnet18", pretrained=True)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v2"])
def test_pretrained_weights_get_a_fresh_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download is replaced by a fresh network's weights; the rest is the real path."""
    weights = resolve_model(name).state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: weights
    )
    model = resolve_model(name, num_classes=6, pretrained=True).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 6)
    kept = [path for path, value in model.state_dict().items() if value.equal(weights[path])]
    assert len(kept) >= len(weights) - 2  # all but the head's weight and bias


@pytest.mark.parametrize(("name", "side"), [("googlenet", 64), ("inception_v3", 96)])
def test_pretrained_auxiliary_classifiers_are_dropped(
    name: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    weights = models.get_model(name, weights=None, init_weights=False).state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: weights
    )
    model = resolve_model(name, num_classes=6, pretrained=True).train()
    assert model(torch.randn(2, 3, side, side)).shape == (2, 6)
