"""What ATen's operations do to channels, by name."""

from __future__ import annotations

MOVES = {
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute",
    "transpose", "t", "numpy_T", "mT", "movedim", "swapaxes", "contiguous", "clone", "expand",
    "expand_as", "repeat", "repeat_interleave", "slice", "narrow", "select", "index_select", "flip",
    "roll", "tile", "stack", "cat", "concat", "hstack", "vstack", "split", "split_with_sizes",
    "chunk", "tensor_split", "unbind", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "broadcast_to", "view_as",
    "reshape_as", "diagonal", "atleast_2d", "im2col", "unfold",
}  # fmt: skip
"""Operations that put elements elsewhere and compute nothing."""
CUTS = {
    "slice": "takes a slice of fixed size of them",
    "narrow": "takes a slice of fixed size of them",
    "select": "takes a slice of fixed size of them",
    "index_select": "takes some of them by number",
    "split": "splits them into parts of fixed size",
    "split_with_sizes": "splits them into parts of fixed size",
    "tensor_split": "splits them into parts of fixed size",
    "unbind": "splits them into parts of fixed size",
}
"""What such an operation does to channels where it works along them: its numbers would not suit
any other width."""
AXIS_AT = {
    "slice": 1, "narrow": 1, "select": 1, "index_select": 1, "unbind": 1, "split": 2,
    "split_with_sizes": 2, "tensor_split": 2, "chunk": 2,
}  # fmt: skip
"""Place of the axis among the arguments of what takes parts."""
SAME = {
    "to", "_to_copy", "type_as", "alias", "detach", "dropout", "feature_dropout", "alpha_dropout",
    "lift_fresh_copy", "native_dropout", "_assert_tensor_metadata",
}  # fmt: skip
"""Operations whose output has the labels of their first input."""
SPATIAL = {
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "lp_pool2d", "grid_sampler",
    "grid_sampler_2d",
}  # fmt: skip
"""Operations that work on every channel, the second axis, by itself."""
REDUCES = {
    "mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "prod", "norm",
    "linalg_vector_norm", "logsumexp", "argmax", "argmin", "median", "any", "all",
}  # fmt: skip
OVER_AXIS = {
    "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "sort", "topk",
    "normalize",
}  # fmt: skip
"""Operations that compute over an axis and keep it."""
PRODUCTS = {"matmul", "bmm", "mm"}
ELEMENTWISE = {
    "hardswish", "hardsigmoid", "hardtanh", "relu6", "leaky_relu", "rrelu", "celu", "selu", "elu",
    "mish", "silu", "gelu", "softplus", "softshrink", "hardshrink", "log_sigmoid", "threshold",
    "prelu", "masked_fill", "where", "lerp", "rsub", "square", "true_divide", "multiply", "divide",
    "subtract", "clip", "softsign", "tanhshrink",
}  # fmt: skip
"""Operations on single elements that do not say so themselves (``torch.Tag.pointwise``)."""
