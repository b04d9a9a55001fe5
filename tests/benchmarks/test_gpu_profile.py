"""A profile's kernels come into groups: made-up lists of kernels, and a real profile of a CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.gpu_profile import (
    ATTENTION,
    COPIES,
    ELEMENTWISE,
    OTHER,
    PRODUCTS,
    THIN,
    Kernel,
    group_of,
    profile_calls,
    read_device,
    report,
)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x128", ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x64x128", ATTENTION),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", ATTENTION),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(...)", ATTENTION),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTN", PRODUCTS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", PRODUCTS),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<...>>", PRODUCTS),
        ("ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn", PRODUCTS),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<...>>", ELEMENTWISE),
        ("triton_poi_fused_add_mul_native_layer_norm_3", ELEMENTWISE),
        ("triton_red_fused__to_copy_addcmul_mean_rsqrt_1", ELEMENTWISE),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_clone_transpose_view_7", ELEMENTWISE),
        ("triton_poi_fused_convolution_2", ELEMENTWISE),
        ("triton_tem_fused_addmm_3", PRODUCTS),
        ("void convertTensor_kernel<__nv_bfloat16, float, float, (cudnnKernelDataType_t)2>", OTHER),
        ("nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNT", PRODUCTS),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, ...>>", ELEMENTWISE),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<...>", ELEMENTWISE),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", ELEMENTWISE),
        ("Memcpy HtoD (Pinned -> Device)", COPIES),
        ("Memset (Device)", COPIES),
        ("a_kernel_that_nobody_knows", OTHER),
    ],
)
def test_a_kernel_is_grouped_by_its_name(name: str, group: str) -> None:
    assert group_of(Kernel(name, 0, 1)) == group


def event(name: str, device: str, start: int, end: int, **more: Any) -> SimpleNamespace:
    """An event as torch.profiler notes it; everything is asked for by a call. Times: microseconds."""
    usual = {"correlation_id": 0, "linked_correlation_id": 0, "shapes": [], "dtypes": []}
    usual |= {"device_type": f"DeviceType.{device}", "start_ns": 1000 * start, "end_ns": 1000 * end}
    values = {"name": name, "is_user_annotation": False, **usual, **more}
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def test_a_devices_kernels_are_joined_with_their_operators() -> None:
    types = ["float", "Scalar", "c10::BFloat16"]
    events = [
        event(
            "aten::mm", "CPU", 0, 5, correlation_id=7, shapes=[[64, 5120], [5120, 32]], dtypes=["float"] * 2
        ),
        event("aten::add", "CPU", 5, 6, correlation_id=8, shapes=[[10, 10], [], [10]], dtypes=types),
        event("cudaLaunchKernel", "CPU", 1, 2, linked_correlation_id=7),
        event("nvjet_a", "CUDA", 100, 140, linked_correlation_id=7),
        event("elementwise_kernel", "CUDA", 150, 160, linked_correlation_id=8),
        event("alone", "CUDA", 170, 180),
        event("Optimizer.step#AdamW", "CUDA", 0, 1000, is_user_annotation=True),
    ]

    found = read_device(events)

    assert [group_of(kernel) for kernel in found.kernels] == [THIN, ELEMENTWISE, OTHER]
    assert [kernel.size for kernel in found.kernels] == [0, 420, 0]
    assert (found.wall, found.busy) == (80, 60)


def test_a_real_profile_of_a_cpu_has_all_groups() -> None:
    """A frozen layer with a LoRA beside it, attention, a norm."""
    wide, down, up = nn.Linear(256, 768), nn.Linear(256, 16), nn.Linear(16, 768)
    x = torch.randn(1, 200, 256)

    def step() -> None:
        q, k, v = (wide(x) + up(down(x))).unflatten(-1, (3, 4, 64)).transpose(1, 3).unbind(2)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        nn.functional.layer_norm(seen, seen.shape[-1:]).square().mean().backward()

    step()
    found = profile_calls(step, 2, torch.device("cpu"))

    groups = {group_of(kernel) for kernel in found.kernels}
    assert {ATTENTION, PRODUCTS, THIN, ELEMENTWISE} <= groups
    assert 0 < found.busy <= found.wall
    thin = [kernel for kernel in found.kernels if group_of(kernel) == THIN]
    assert all(16 in {side for shape in kernel.shapes for side in shape} for kernel in thin)
    assert "| attention | " in report(found, 2)
