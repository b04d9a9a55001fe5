"""A profile's kernels come into groups: made-up lists of kernels, and a real profile of a CPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gpu
from benchmarks.gpu_profile import (
    ATTENTION,
    COPIES,
    ELEMENTWISE,
    IDLE,
    OTHER,
    PRODUCTS,
    THIN,
    Kernel,
    Profile,
    busy_time,
    group_of,
    profile_calls,
    read_cpu,
    read_device,
    report,
)
from benchmarks.gpu_rows import BY_NAME
from tests.tiny.hunyuan_encoders import save
from tests.tiny.wan_encoders import t5_tensors


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


@pytest.mark.parametrize(
    ("operator", "shapes", "group"),
    [
        ("aten::mm", ((32760, 5120), (5120, 5120)), PRODUCTS),
        ("aten::mm", ((32760, 5120), (5120, 32)), THIN),
        ("aten::mm", ((32, 32760), (32760, 5120)), THIN),
        ("aten::addmm", ((5120,), (32760, 32), (32, 5120)), THIN),
        ("aten::addmm", ((5120,), (1, 5120), (5120, 5120)), PRODUCTS),  # a vector, not a LoRA
        ("aten::_scaled_mm", ((32760, 5120), (5120, 13824), (32760, 1), (1, 13824)), PRODUCTS),
    ],
)
def test_a_product_is_thin_if_a_matrix_has_a_short_side(
    operator: str, shapes: tuple[tuple[int, ...], ...], group: str
) -> None:
    assert group_of(Kernel("nvjet_hsh_128x64", 0, 1, operator, shapes)) == group


def test_an_unknown_kernel_is_grouped_by_the_operator_that_asked_for_it() -> None:
    assert group_of(Kernel("unknown", 0, 1, "aten::_scaled_dot_product_cudnn_attention")) == ATTENTION


def test_kernels_on_two_streams_are_busy_together() -> None:
    kernels = [Kernel("a", 0, 10), Kernel("b", 5, 15), Kernel("c", 6, 7), Kernel("d", 20, 30)]
    assert busy_time(kernels) == 25


def test_the_report_has_shares_of_the_step_the_gaps_and_the_largest_kernels() -> None:
    kernels = (
        Kernel("flash_fwd", 0, 4000),
        Kernel("flash_bwd", 4000, 10_000),
        Kernel("nvjet", 11_000, 15_000, "aten::mm", ((4096, 4096), (4096, 4096))),
        Kernel("nvjet", 15_000, 16_000, "aten::mm", ((4096, 4096), (4096, 32))),
        Kernel("elementwise_kernel", 16_000, 18_000, "aten::add", ((4096, 4096),), 8_000_000),
    )

    text = report(Profile(kernels, wall=20_000, busy=busy_time(kernels)), calls=2).splitlines()

    assert f"| {ATTENTION} | 5.00 | 50.0% | 1 | - | flash_bwd |" in text
    assert f"| {PRODUCTS} | 2.00 | 20.0% | 0 | - | nvjet |" in text
    assert f"| {THIN} | 0.50 | 5.0% | 0 | - | nvjet |" in text
    assert f"| {ELEMENTWISE} | 1.00 | 10.0% | 0 | 4 | elementwise_kernel |" in text
    assert f"| {IDLE} | 1.50 | 15.0% | - | - | - |" in text
    assert f"| flash_bwd | 3.00 | 30.0% | 0 | - | {ATTENTION} |" in text


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


def test_a_profile_without_kernels_is_empty() -> None:
    assert read_device([event("aten::mm", "CPU", 0, 5)]) == read_cpu([]) == Profile((), 0.0, 0.0)


def test_torch_notes_events_with_what_is_asked_of_them() -> None:
    """A CPU's events are of the same class as a GPU's."""
    with torch.profiler.profile(record_shapes=True) as found:
        torch.ones(4, 8) @ torch.ones(8, 3)
    assert found.profiler is not None
    assert found.profiler.kineto_results is not None
    events = found.profiler.kineto_results.events()
    (product,) = [event for event in events if event.name() == "aten::mm"]

    kernel = event("nvjet", "CUDA", 1, 2, linked_correlation_id=product.correlation_id())

    assert read_device([*events, kernel]).kernels == [Kernel("nvjet", 1.0, 2.0, "aten::mm", ((4, 8), (8, 3)))]


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


def test_a_row_is_profiled_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is there is not written again, so that a tiny one may stand in."""
    name = BY_NAME["cache-umt5"].model.manifest
    save(tmp_path / f"{name}.safetensors", t5_tensors())

    gpu.main(["--profile", "cache-umt5", "--folder", str(tmp_path), "--device", "cpu"])

    text = capsys.readouterr().out
    assert text.startswith("cache-umt5: umT5, texts of 256 tokens\n")
    for group in (ATTENTION, PRODUCTS, ELEMENTWISE, IDLE):
        assert f"| {group} | " in text
