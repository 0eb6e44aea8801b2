"""The estimate: right order of things, and above what tiny runs really take (real peaks are in docs/log.md)."""

from nybble.data import generate
from nybble.models import selection
from nybble.training import memory
from tests.tiny import make_model

SHAPES = memory.ModelShapes.of(make_model("llama"), selection.select_layers(make_model("llama")).int4, 4)


def test_shapes_are_those_of_the_model() -> None:
    # per layer: q, o 64 x 64; k, v 32 x 64; gate, up 128 x 64; down 64 x 128
    assert SHAPES.int4 == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert SHAPES.features == 2 * (2 * 128 + 2 * 96 + 3 * 192)
    assert SHAPES.largest == 128 * 64


def test_cache_costs_a_weight_and_a_gradient_copy() -> None:
    with_cache, without = (memory.training_memory(SHAPES, 8, 64, 256, 64, copies, 0) for copies in (2, 0))
    assert with_cache - without == 2 * SHAPES.int4 * 4


def test_memory_is_what_the_larger_of_training_and_measuring_takes() -> None:
    sizes = [memory.training_memory(SHAPES, 8, 64, 256, 64, 2, logits) for logits in (0, 1000, 10**9, 2 * 10**9)]
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3] - 10**9


def test_microbatch_grows_with_memory_and_stops_at_the_batch() -> None:
    picks = [
        memory.pick_microbatch(SHAPES, 8, 64, 1024, 32, 64, 2, available=int(available), most=10**9)
        for available in (1e6, 1.5e9, 3e9, 1e12)
    ]
    assert picks[0] == 1
    assert picks == sorted(picks)
    assert picks[-1] == 32
    assert memory.pick_microbatch(SHAPES, 8, 64, 1024, 32, 64, 2, available=10**12, most=4096) == 4


def test_compression_of_large_models_fits_where_the_issue_wants_it() -> None:
    llama_8b = memory.ModelShapes(8_030_000_000, 6_980_000_000, 0, 58_700_000, 32, 4096, 14336, 128256, 2)
    assert 16.06e9 < memory.compression_memory(llama_8b, 128, 1024, gpu=True) < 22e9  # bfloat16 on a GPU of 24 GB
    smollm_2b = memory.ModelShapes(1_710_000_000, 1_610_000_000, 0, 16_700_000, 24, 2048, 8192, 49152, 4)
    assert 6.84e9 < memory.compression_memory(smollm_2b, 128, 1024, gpu=False) < 12e9  # float32 on a CPU


def test_compression_grows_with_the_text_until_it_goes_to_the_disk() -> None:
    sizes = [memory.compression_memory(SHAPES, count, 1024, gpu=False) for count in (1, 1000, 10**6, 10**7)]
    assert sizes[1] - sizes[0] == 2 * 999 * 1024 * 64 * 4
    assert sizes[2] == sizes[3]
    assert memory.blocks_disk(SHAPES, 0) == 0
    assert memory.blocks_disk(SHAPES, 50) == SHAPES.parameters * 4 + 2 * 50 * 64 * 4


def test_writing_takes_as_many_sequences_as_fit_into_a_gibibyte() -> None:
    from types import SimpleNamespace

    eight_b = SimpleNamespace(
        num_hidden_layers=32, num_key_value_heads=8, num_attention_heads=32, head_dim=128, hidden_size=4096
    )
    assert generate.generation_batch(eight_b, 1024, 2) == (1 << 30) // (2 * 32 * 8 * 128 * 1024 * 2) == 8
    assert generate.generation_batch(eight_b, 1 << 20, 2) == 1
    assert generate.generation_batch(eight_b, 8, 2) == 128
    assert (
        generate.generation_batch(eight_b, 1024, 2, gpu_memory=80 << 30)
        == (80 << 30) // 4 // (2 * 32 * 8 * 128 * 1024 * 2)
        == 160
    )
    assert generate.generation_batch(eight_b, 8, 2, gpu_memory=80 << 30) == 1024
