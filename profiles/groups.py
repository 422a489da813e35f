"""What kind of work a kernel does, by its name: a GPU's kernel, a copy or fill, or on a CPU an operator of torch."""

import re
from functools import cache

_BY_NAME = (
    ("communication", r"nccl|c10d|gloo|all_gather|all_reduce|reduce_scatter|allgather|allreduce"),
    ("synchronisation", r"_local_scalar_dense|aten::item$|aten::is_nonzero|Synchronize"),
    ("attention", r"flash|fmha|scaled_dot_product|_efficient_attention|^_prefix_kernel|^_suffix_kernel|^_fold_kernel"),
    ("sampling", r"^_sample_\w+_kernel|^_threshold_kernel|philox|multinomial|aten::topk|aten::sort"),
    (
        "loss",
        r"^_row_kernel|^_logprob_\w+_kernel|^_token_kernel|^_sequence_kernel|^_weight_kernel|^_finish_kernel"
        r"|^_scale_kernel|^_group_kernel|^_batch_kernel|^_pair_kernel|^_matched_kernel|log_softmax|nll_loss",
    ),
    (
        "GEMM",
        r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|splitK|convolution|conv2d|conv3d"
        r"|aten::(mm|bmm|addmm|baddbmm|addmv|mv|dot|matmul|linear)$",
    ),
    ("host", r"^autograd::|^torch::|(?-i:Backward)\d*$|^FSDP|^Optimizer\.|^cuda[A-Z]|^cu[A-Z]|^CompiledFunction"),
    ("optimizer", r"adam|multi_tensor|_foreach"),
    (
        "copy",
        r"memcpy|memset|copy|aten::(cat|stack|index|index_select|gather|scatter|scatter_|index_put_|_index_put_impl_"
        r"|index_add_|fill_|zero_|clone|contiguous|repeat_interleave|masked_select|roll|flip|embedding)$|CatArray|fill",
    ),
)
_PATTERNS = [(group, re.compile(pattern, re.IGNORECASE)) for group, pattern in _BY_NAME]
_REST = "norm and elementwise"
GROUPS = (*(group for group, _ in _BY_NAME), _REST)


@cache
def group_of(name: str) -> str:
    """One of GROUPS."""
    if "rms_norm" in name:
        return _REST
    return next((group for group, pattern in _PATTERNS if pattern.search(name)), _REST)
