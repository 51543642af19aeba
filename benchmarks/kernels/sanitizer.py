"""What compute-sanitizer looks at: a few small tests of every operator that has GPU kernels, minutes a tool.

memcheck (out of bounds, misaligned) and racecheck (hazards in shared memory) run tests. initcheck (reads of what was
never written) can't: the tests fill fresh memory with NaN. It runs the benchmark's tiny shapes.
"""

from __future__ import annotations

from collections.abc import Iterator

ERROR = 9  # how the tool ends when it found something
# Without the allocator's cache: inside its blocks, what is out of bounds looks in order.
ENVIRONMENT = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)

# By file of tests/kernels: test functions with odd, empty and strided inputs, forward and backward.
TESTS = {
    "hstu_attention_triton": (
        "test_nothing_and_single_rows",
        "test_no_sequences",
        "test_wide_heads",
        "test_strides_are_taken_as_they_come",
        "test_deterministic_runs_are_equal",
        "test_targets_do_not_see_each_other",
        "test_cached_equals_full",
    ),
    "fused_layer": (
        "test_wide_rows_and_narrow_weights",
        "test_slices_are_taken_as_they_come",
        "test_a_row_that_is_not_finite_stays_alone",
        "test_dropout_is_a_function_of_key_row_and_column",
    ),
    "log_partition": (
        "test_triton_of_one_item",
        "test_triton_gives_the_same_bits_again",
        "test_triton_forms_only_the_gradients_asked_for",
        "test_a_query_that_sees_nothing",
    ),
    "sampled_softmax": (
        "test_triton_gives_the_same_bits_again",
        "test_rows_of_32_bits_and_strided_negatives",
        "test_without_bias_and_weights",
        "test_large_logits",
    ),
    "jagged": (
        "test_concat_and_its_gradient",
        "test_split_is_the_inverse",
        "test_padded_and_back",
        "test_padded_without_rows",
        "test_gradient_of_a_padded_tensor",
        "test_gradient_of_tables_splits_long_sums",
        "test_dropout_decides_by_key_row_and_column",
    ),
    "counter_random": (
        "test_a_draw_is_the_documented_word",
        "test_implementations_agree_to_the_bit",
        "test_empty_and_strided_inputs",
    ),
    "bias_table_gradient": (
        "test_sums",
        "test_blocks_of_scores_as_they_come",
        "test_triton_reads_sixteen_bits",
        "test_triton_sums_in_pieces_and_parts",
    ),
}
# Of those: no other implementations, no large inputs.
ON_GPU = "not reference and not cpp and not chunked and not 300000"
# Threads that meet in shared memory by more than Triton's own layouts: tiles turned, histograms, sums over warps.
RACECHECK = ("hstu_attention_triton", "fused_layer", "bias_table_gradient")
# Few kernels of others around ours, whose reads would have to be told apart.
INITCHECK = ("hstu_attention", "sampled_softmax", "jagged", "bias_table_gradient")


def steps(python: str, run: tuple[str, ...], out: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, command): a tool on an operator each.  run: the benchmark's program; out: a folder for its results."""
    for tool, files in (("memcheck", tuple(TESTS)), ("racecheck", RACECHECK)):
        for file in files:
            tests = (f"tests/kernels/test_{file}.py::{test}" for test in TESTS[file])
            pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", ON_GPU, *tests)
            yield f"{tool}-{file}", (*_tool(tool), *pytest)
    tiny = ("--grid", "tiny", "--rounds", "1", "--seconds", "1", "--against", "none", "--no-memory")
    for operator in INITCHECK:
        command = (python, *run, operator, "--device", "cuda", *tiny, "--out", f"{out}/initcheck")
        yield f"initcheck-{operator}", (*_tool("initcheck"), *command)


def _tool(name: str) -> tuple[str, ...]:
    return ("compute-sanitizer", "--tool", name, "--error-exitcode", str(ERROR))
