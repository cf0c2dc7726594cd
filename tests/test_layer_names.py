"""TensorRT's layer names, as recorded from its profiler, back to ONNX nodes."""

from __future__ import annotations

import pytest

from profilers.backends.layer_names import attribute, is_reformat, onnx_nodes


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
            ("/net/net.2/Gemm", "(Unnamed Layer* 10) [ElementWise", "/net/net.3/Relu"),
        ),
        ("/features/features.0/Conv", ("/features/features.0/Conv",)),
    ],
)
def test_names(name: str, nodes: tuple[str, ...]) -> None:
    assert onnx_nodes(name) == nodes


def test_metadata_goes_before_the_name() -> None:
    metadata = "[ONNX Layer: node_conv2d]\x1e[ONNX Layer: node_relu]"
    assert onnx_nodes("__myl_ConvActiv_myl0_3", metadata) == ("node_conv2d", "node_relu")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Reformatting CopyNode for Input Tensor 0 to node_conv2d + node_relu", True),
        ("Reformatting CopyNode for Input Tensor 0 to {ForeignNode[a...b]}", True),
        ("__myl_Move_myl3_0", True),
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
