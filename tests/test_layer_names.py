"""TensorRT's layer names, as its logs and profiles show them, back to ONNX nodes."""

from __future__ import annotations

import pytest

from profilers.backends.tensorrt.names import attribute, is_reformat, onnx_nodes


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("node_conv2d", ("node_conv2d",)),
        ("node_conv2d_3 + node_add + node_relu_2", ("node_conv2d_3", "node_add", "node_relu_2")),
        (
            "resnetv15_conv0_fwd + resnetv15_batchnorm0_fwd + resnetv15_relu0_fwd",
            ("resnetv15_conv0_fwd", "resnetv15_batchnorm0_fwd", "resnetv15_relu0_fwd"),
        ),
        ("conv1 + PWN(re_lu_clip)", ("conv1", "re_lu_clip")),
        ("PWN(PWN(node_sigmoid), node_mul)", ("node_sigmoid", "node_mul")),
        ("node_conv2d_4 || node_conv2d_5", ("node_conv2d_4", "node_conv2d_5")),
        (
            "{ForeignNode[conv1/7x7_s2...loss3/classifier]}",
            ("conv1/7x7_s2", "loss3/classifier"),
        ),
        (
            "/net/net.2/Gemm + (Unnamed Layer* 10) [ElementWise] + /net/net.3/Relu",
            ("/net/net.2/Gemm", "(Unnamed Layer* 10) [ElementWise]", "/net/net.3/Relu"),
        ),
        ("/features/features.0/Conv", ("/features/features.0/Conv",)),
    ],
)
def test_names(name: str, nodes: tuple[str, ...]) -> None:
    assert onnx_nodes(name) == nodes


# As public logs hold them: trtexec's profile in NVIDIA/TensorRT issues 3842 and 4236 and its engine
# layers in issue 4397, profiles of YOLO networks (TensorRT 8.6 and 10), and the kernels of an
# engine that TensorRT-RTX 1.7 built of torchvision's resnet18.
RECORDED = [
    (
        "node_of_gpu_0/conv1_1 + node_of_gpu_0/res_conv1_bn_1 + node_of_gpu_0/res_conv1_bn_2",
        ("node_of_gpu_0/conv1_1", "node_of_gpu_0/res_conv1_bn_1", "node_of_gpu_0/res_conv1_bn_2"),
    ),
    (
        "/features/features.0/Conv + /features/features.1/Relu",
        ("/features/features.0/Conv", "/features/features.1/Relu"),
    ),
    (
        "PWN(PWN(/model.0/act/Sigmoid), /model.0/act/Mul)",
        ("/model.0/act/Sigmoid", "/model.0/act/Mul"),
    ),
    (
        "/model.2/m.0/cv2/conv/Conv + PWN(PWN(PWN(/model.2/m.0/cv2/act/Sigmoid), "
        "/model.2/m.0/cv2/act/Mul), /model.2/m.0/Add)",
        (
            "/model.2/m.0/cv2/conv/Conv", "/model.2/m.0/cv2/act/Sigmoid",
            "/model.2/m.0/cv2/act/Mul", "/model.2/m.0/Add",
        ),
    ),
    (
        "/model.22/cv2.2/cv2.2.0/conv/Conv || /model.22/cv3.2/cv3.2.0/conv/Conv",
        ("/model.22/cv2.2/cv2.2.0/conv/Conv", "/model.22/cv3.2/cv3.2.0/conv/Conv"),
    ),
    (
        "{ForeignNode[(Unnamed Layer* 3274) [Shuffle]...Transpose_7808 + Reshape_7814]}",
        ("(Unnamed Layer* 3274) [Shuffle]", "Transpose_7808", "Reshape_7814"),
    ),
    (
        "{ForeignNode[/encoder/Unsqueeze_3 + /encoder/Unsqueeze_4.../match_model/Squeeze]}",
        ("/encoder/Unsqueeze_3", "/encoder/Unsqueeze_4", "/match_model/Squeeze"),
    ),
    ("{ForeignNode[fc.bias...node_linear_1]}", ("fc.bias", "node_linear_1")),
    ("__myl_MoveNegExpAddDivMul_myl5_0", ("__myl_MoveNegExpAddDivMul_myl5_0",)),
    ("node_Conv_292_myl0_1", ("node_Conv_292",)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "nodes"), RECORDED)
def test_recorded_names(name: str, nodes: tuple[str, ...]) -> None:
    assert onnx_nodes(name) == nodes


@pytest.mark.parametrize(("name", "nodes"), RECORDED)
def test_a_change_of_layout_names_the_layer_it_is_for(name: str, nodes: tuple[str, ...]) -> None:
    copy = f"Reformatting CopyNode for Input Tensor 1 to {name}"
    assert is_reformat(copy)
    assert onnx_nodes(copy) == nodes


def test_metadata_goes_before_the_name() -> None:
    # both separators are in one engine of TensorRT-RTX 1.7
    for separator in ("\x1e", "\x1f"):
        metadata = f"[ONNX Layer: node_Conv_298]{separator}[ONNX Layer: node_add]"
        assert onnx_nodes("__myl_ConvActiv_myl0_3", metadata) == ("node_Conv_298", "node_add")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Reformatting CopyNode for Input Tensor 0 to node_conv2d + node_relu", True),
        ("Reformatting CopyNode for Input Tensor 0 to {ForeignNode[a...b]}", True),
        ("__myl_Move_myl3_0", True),
        ("/model.2/cv1/act/Mul_output_0 copy", True),
        ("__myl_MoveNegExpAddDivMul_myl5_0", False),
        ("node_conv2d + node_relu", False),
        ("reformat_block.conv", False),
    ],
)
def test_changes_of_layout(name: str, expected: bool) -> None:
    assert is_reformat(name) is expected


NODES = ["conv1", "relu1", "pool", "conv2", "conv3", "add", "relu3", "mean", "flat", "fc"]
LAYERS = ["conv1", "conv2", "conv3", "fc"]


def test_times_go_to_the_layers_they_were_spent_on() -> None:
    found = attribute(
        [
            ("Reformatting CopyNode for Input Tensor 0 to conv1 + relu1", 0.1),
            ("conv1 + relu1", 1.0),
            ("pool", 0.2),
            ("conv2 || conv3", 0.8),
            ("PWN(add, relu3)", 0.3),
            ("{ForeignNode[mean...fc]}", 0.5),
            ("__myl_Unknown_myl0_1", 0.05),
        ],
        NODES,
        LAYERS,
    )
    assert found.by_node == {
        "conv1": 1.0, "pool": 0.2, "conv2": 0.4, "conv3": 0.4, "add": 0.3, "fc": 0.5,
    }  # fmt: skip
    assert found.reformat_ms == 0.1
    assert found.other_ms == {"__myl_Unknown_myl0_1": 0.05}


def test_a_region_over_several_layers_is_shared() -> None:
    found = attribute([("{ForeignNode[conv2...fc]}", 0.9)], NODES, LAYERS)
    assert found.by_node == pytest.approx({"conv2": 0.3, "conv3": 0.3, "fc": 0.3})


def test_no_time_is_lost() -> None:
    reported = [("conv1 + relu1", 1.0), ("x", 0.25), ("conv2 || conv3", 0.5), ("Reformatting "
                "CopyNode for Output Tensor 0 to fc", 0.125)]  # fmt: skip
    found = attribute(reported, NODES, LAYERS)
    total = sum(found.by_node.values()) + found.reformat_ms + sum(found.other_ms.values())
    assert total == sum(ms for _, ms in reported)
