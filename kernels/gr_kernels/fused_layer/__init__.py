"""What stands before and after the attention of an HSTU block, each as one operator (README.md)."""

from gr_kernels.fused_layer.op import (
    gated_output as gated_output,
    norm_linear_silu as norm_linear_silu,
    norm_linear_silu_parts as norm_linear_silu_parts,
)
