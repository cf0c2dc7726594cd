"""Networks for 32x32 (and 24x24) images.

Residual networks: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition",
CVPR 2016, arXiv:1512.03385, section 4.2. They differ in the shortcuts: where the shape
changes, a 1x1 convolution with batch norm stands for the paper's parameter-free option A,
because zero-padded channels cannot be pruned apart from their neighbours.

VGG-16: Simonyan and Zisserman, ICLR 2015, arXiv:1409.1556, configuration D, with batch
norm and one linear layer for the three of the paper, as usual for CIFAR.

MobileNetV2: Sandler et al., CVPR 2018, arXiv:1801.04381, table 2. The stem and the first
downsampling stage have stride 1, as usual for CIFAR: 32x32 ends at 4x4.
"""

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: ``[B, in, H, W]`` to ``[B, out, H/s, W/s]``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """A 3x3 stem, stages of basic blocks, global average pool, linear head.

    Args:
        blocks: basic blocks of each stage.
        widths: channels of each stage; the stem has ``widths[0]``. Every stage but the
            first halves the resolution.
        num_classes: outputs.

    Example: ``CifarResNet((3, 3, 3), (16, 32, 64), 10)`` is ResNet-20.
    """

    def __init__(self, blocks: tuple[int, ...], widths: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        if len(blocks) != len(widths):
            raise ValueError(f"one width a stage: got {len(blocks)} stages, widths {widths}")
        self.stem = _conv_bn_relu(3, widths[0])
        stages = []
        in_channels = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stages.append(_stage(in_channels, width, count, stride=2 if stage else 1))
            in_channels = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(widths[-1], num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to logits ``[B, num_classes]``."""
        return self.head(self.flatten(self.pool(self.stages(self.stem(x)))))


class CifarVGG16(nn.Module):
    """Thirteen 3x3 convolutions with batch norm, five max pools, one linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                layers.append(_conv_bn_relu(in_channels, width))
                in_channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(in_channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to logits ``[B, num_classes]``."""
        return self.head(self.flatten(self.pool(self.features(x))))


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter depthwise by 3x3, project by 1x1 without activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_conv_bn_relu6(in_channels, hidden, kernel=1))
        layers += [
            _conv_bn_relu6(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.layers = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.has_shortcut else self.layers(x)


# expansion, channels, blocks, stride: table 2, the second stage's stride 2 made 1
MOBILENETV2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 with a stride-1 stem.

    Args:
        num_classes: outputs.
        stages: expansion, channels, blocks and stride of each.
        last_width: channels of the last 1x1 convolution.
    """

    def __init__(
        self,
        num_classes: int,
        stages: tuple[tuple[int, int, int, int], ...] = MOBILENETV2_STAGES,
        last_width: int = 1280,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn_relu6(3, 32, kernel=3)]
        in_channels = 32
        for expansion, width, count, stride in stages:
            for block in range(count):
                block_stride = stride if block == 0 else 1
                layers.append(InvertedResidual(in_channels, width, block_stride, expansion))
                in_channels = width
        layers.append(_conv_bn_relu6(in_channels, last_width, kernel=1))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(last_width, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to logits ``[B, num_classes]``."""
        return self.head(self.dropout(self.flatten(self.pool(self.features(x)))))


def cifar_resnet20(num_classes: int = 10) -> CifarResNet:
    """ResNet-20: 0.27 M parameters, 41 M multiply-adds at 32x32."""
    return CifarResNet((3, 3, 3), (16, 32, 64), num_classes)


def cifar_resnet32(num_classes: int = 10) -> CifarResNet:
    """ResNet-32: 0.46 M parameters."""
    return CifarResNet((5, 5, 5), (16, 32, 64), num_classes)


def cifar_resnet56(num_classes: int = 10) -> CifarResNet:
    """ResNet-56: 0.85 M parameters, 126 M multiply-adds at 32x32."""
    return CifarResNet((9, 9, 9), (16, 32, 64), num_classes)


def cifar_resnet110(num_classes: int = 10) -> CifarResNet:
    """ResNet-110: 1.7 M parameters."""
    return CifarResNet((18, 18, 18), (16, 32, 64), num_classes)


def cifar_resnet18(num_classes: int = 10) -> CifarResNet:
    """ResNet-18 of the ImageNet widths, with a 3x3 stem and no max pool: 11.2 M parameters."""
    return CifarResNet((2, 2, 2, 2), (64, 128, 256, 512), num_classes)


def cifar_vgg16(num_classes: int = 10) -> CifarVGG16:
    """VGG-16 with batch norm and one linear layer: 14.7 M parameters."""
    return CifarVGG16(num_classes)


def cifar_mobilenetv2(num_classes: int = 10) -> CifarMobileNetV2:
    """MobileNetV2 with a stride-1 stem: 2.2 M parameters."""
    return CifarMobileNetV2(num_classes)


def glyphs_resnet(num_classes: int = 36) -> CifarResNet:
    """The 14-layer residual network of the ``glyphs`` benchmarks: 0.70 M parameters."""
    return CifarResNet((2, 2, 2), (32, 64, 128), num_classes)


def glyphs_resnet_flat(num_classes: int = 36) -> CifarResNet:
    """As ``glyphs_resnet``, but 48 channels wide throughout: 0.28 M parameters.

    A width that does not grow as the resolution falls is simple to write down, and spends three
    quarters of the arithmetic on the first stage.
    """
    return CifarResNet((2, 2, 2), (48, 48, 48), num_classes)


def glyphs_resnet_wide(num_classes: int = 36) -> CifarResNet:
    """As ``glyphs_resnet``, 64, 96 and 128 channels wide: four to eight steps of 16 a group."""
    return CifarResNet((2, 2, 2), (64, 96, 128), num_classes)


def glyphs_resnet_stepped(num_classes: int = 36) -> CifarResNet:
    """As ``glyphs_resnet``, 48, 64 and 96 channels wide: three to six steps of 16 a group.

    Half of the arithmetic of ``glyphs_resnet_wide``, for sweeps of many runs.
    """
    return CifarResNet((2, 2, 2), (48, 64, 96), num_classes)


def glyphs_resnet8(num_classes: int = 36) -> CifarResNet:
    """ResNet-8, one block a stage, 32, 64 and 96 channels wide: 0.23 M parameters.

    Four to twelve steps of 8 a group, or two to six of 16; under a third of the arithmetic of
    ``glyphs_resnet_stepped``, for sweeps that two cores finish in an afternoon.
    """
    return CifarResNet((1, 1, 1), (32, 64, 96), num_classes)


def glyphs_resnet10(num_classes: int = 36) -> CifarResNet:
    """ResNet-10, four stages of a block, 48 to 128 channels wide: 0.53 M parameters.

    Three to eight steps of 16 a group; narrow enough to lose accuracy when it is cut.
    """
    return CifarResNet((1, 1, 1, 1), (48, 64, 96, 128), num_classes)


def glyphs_mobilenet(num_classes: int = 36) -> CifarMobileNetV2:
    """MobileNetV2 in small: six inverted residual blocks, 128 to 384 channels inside.

    Three to six steps of 16 in the residual streams, and two halvings of the resolution.
    """
    stages = ((4, 48, 2, 2), (4, 64, 2, 1), (4, 96, 2, 2))
    return CifarMobileNetV2(num_classes, stages, last_width=256)


def glyphs_mobilenet5(num_classes: int = 36) -> CifarMobileNetV2:
    """MobileNetV2 in small: five inverted residual blocks, two with a shortcut, 0.2 M parameters.

    Four to twelve steps of 8 in the residual streams; a quarter of the arithmetic of
    ``glyphs_mobilenet``, for sweeps that two cores finish in an afternoon.
    """
    stages = ((2, 32, 1, 2), (4, 64, 2, 2), (4, 96, 2, 1))
    return CifarMobileNetV2(num_classes, stages, last_width=192)


def _stage(in_channels: int, width: int, count: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, width, stride)
    return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(count - 1)))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(projection, nn.BatchNorm2d(out_channels))


def _conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _conv_bn_relu6(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(),
    )


def _initialise(network: nn.Module) -> None:
    """Kaiming (fan out) for convolutions; batch norm and linear keep PyTorch's defaults."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
