"""The Triton kernels of the attention, one file a pass; triton_op.py launches them."""

from gr_kernels.hstu_attention.triton_backward import d_kv_kernel, d_q_kernel, delta_kernel
from gr_kernels.hstu_attention.triton_forward import forward_kernel
from gr_kernels.hstu_attention.triton_outside import zero_outside_kernel
from gr_kernels.hstu_attention.triton_table_gradients import table_gradients_kernel

__all__ = [
    "d_kv_kernel",
    "d_q_kernel",
    "delta_kernel",
    "forward_kernel",
    "table_gradients_kernel",
    "zero_outside_kernel",
]
