"""What must stay fast, without a clock: which kernels run, and how large tensors become."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dymu import DyMU, attention, causal_attention, vtu_attention
from extras.sampled import spread

FUSED = "_scaled_dot_product_flash_attention_for_cpu"


class Watch(TorchDispatchMode):
    """The names of what runs, and the bytes of the largest tensor that is made"""

    def __init__(self):
        super().__init__()
        self.names = set()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def fused(watch):
    return FUSED in watch.names and not watch.names & {"_softmax", "bmm", "baddbmm"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_pytorchs_fused_kernel_is_what_runs(dtype, kv_heads):
    N, N_un = 200, 96
    token_at = torch.cat((torch.arange(N_un), torch.randint(N_un, (N - N_un,))))
    angle = torch.rand(N, 16)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    q = torch.randn(4, N_un, 32).to(dtype)
    k = torch.randn(kv_heads, N_un, 32).to(dtype)
    bias = torch.rand(N_un).to(dtype)
    some = spread(1)(token_at).sort().values
    for run in (
        lambda: attention(q, k, k, mask=bias.expand(N_un, -1)),
        lambda: causal_attention(q, k, k),
        lambda: causal_attention(q[:, :70], k, k, torch.arange(70)),
        lambda: causal_attention(q[:, :1], k, k),
        lambda: vtu_attention(q, k, k, token_at, cos, sin),
        lambda: vtu_attention(q, k, k, token_at, cos, sin, some),
        lambda: vtu_attention(q[:, -3:], k, k, token_at, cos, sin),
    ):
        with Watch() as watch:
            run()
        assert fused(watch), watch.names

    with Watch() as watch:  # the mask that was slow
        attention(q, k, k, mask=bias.expand(4, N_un, -1))
    assert not fused(watch)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_a_step_reads_each_head_of_the_keys_once(kv_heads):
    q = torch.randn(8, 1, 32)
    k, v = torch.randn(2, kv_heads, 200, 32)
    kernel = F.scaled_dot_product_attention
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=kernel) as run:
        got = causal_attention(q, k, v)
    assert run.call_args.args[0].shape == (1, kv_heads, 8 // kv_heads, 32)
    expected = attention(q, k, v)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)

    def transposed(*given, **options):  # as some kernels on a GPU lay out what they give
        return kernel(*given, **options).transpose(1, 2).contiguous().transpose(1, 2)

    with mock.patch.object(F, "scaled_dot_product_attention", transposed):
        torch.testing.assert_close(causal_attention(q, k, v), expected, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("queries", [None, spread(1)])
def test_the_fused_kernel_runs_in_the_model_too(llava, ids, images, queries):
    with Watch() as watch:
        llava(ids, images[3], DyMU(r=(4, 3, 2), queries=queries))
    assert fused(watch), watch.names


@torch.no_grad()
@pytest.mark.parametrize("queries", [None, spread(1), spread(3)])
@pytest.mark.parametrize("share", [1.0, 0.16])
def test_nothing_grows_with_the_square_of_the_positions(queries, share):
    """At the 7,309 positions of a picture in tiles: less than a byte for two pairs of them."""
    N = 7309
    N_un = int(share * N)
    token_at = torch.cat((torch.arange(N_un), torch.randint(N_un, (N - N_un,))))
    angle = torch.rand(N, 4)
    q = torch.randn(2, N_un, 8)
    k = torch.randn(1, N_un, 8)
    query_at = None if queries is None else queries(token_at).sort().values
    with Watch() as watch:
        vtu_attention(q, k, k, token_at, angle.cos(), angle.sin(), query_at)
    assert N * 8 * 4 <= watch.largest < N * N / 2
