"""Collectives and cycles of compiled programs against hand counts."""

from tokenflow_jax.parallel import hlo

HLO = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%condition (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
}

%body (p: (s32[])) -> (s32[]) {
  %one = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0}) all-reduce(%x, %y), to_apply=%add
}

%start (p: f32[8]) -> f32[32] {
  ROOT %gather = f32[32]{0} all-gather(%p), channel_id=7, dimensions={0}
}

%beside (p: f32[8]) -> f32[32] {
  %gather = f32[32]{0} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %sum = f32[32]{0} add(%gather, %gather)
}

ENTRY %main (p: f32[]) -> f32[] {
  %started = f32[32]{0} fusion(%x), kind=kCustom, calls=%start
  %going = f32[32]{0} fusion(%started), kind=kCustom, calls=%beside
  %kernel = f32[4]{0} custom-call(%p), frontend_attributes={kernel_metadata={
"metadata":"{}"
}}, metadata={op_name="attributes of several lines"}
  %loop = (s32[]) while(%t), condition=%condition, body=%body
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%z), dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
}
"""


def test_collectives_in_loops_count_every_iteration():
    expected = {"all-gather": (2, 256), "all-reduce": (12, 12 * (2048 + 16))}
    assert hlo.read(HLO).collectives == expected
    # The start and the fused gather run beside other work; a sum is sent twice.
    read = hlo.read(HLO)
    assert (read.beside, read.waiting) == (2 * 128, 2 * 12 * (2048 + 16))


TPU = """
%inside (p: f32[8]) -> f32[8] {
  ROOT %half = f32[8]{0} add(%p, %p), backend_config={"window_config":{"estimated_cycles":"1"}}
}

%all-reduce-scatter.1 (p: bf16[8,4]) -> bf16[2,4] {
  %sum = bf16[8,4]{1,0} all-reduce(%p), channel_id=2, to_apply=%add
  ROOT %own = bf16[2,4]{1,0} dynamic-slice(%sum, %i, %j), dynamic_slice_sizes={2,4}
}

%condition (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
}

%body (p: (s32[])) -> (s32[]) {
  %f = f32[8]{0} fusion(%x), calls=%inside, backend_config={"estimated_cycles":"70"}
}

ENTRY %main (p: f32[]) -> f32[] {
  %copy.1 = f32[8]{0} copy(%p), backend_config={"window_config":{"estimated_cycles":"200"}}
  %copy.2 = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"9223372036854775807"}
  %loop = (s32[]) while(%t), condition=%condition, body=%body
  %own = bf16[2,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %parts = f32[2]{0} reduce-scatter(%copy.1), channel_id=1, dimensions={0}, to_apply=%add
}
"""


def test_cycles_of_loops_and_fusions():
    read = hlo.read(TPU)
    assert read.cycles == 200 + 5 * 70  # a fusion's own estimate covers what is inside
    # Two ways to write it; operands of 64 and 32 bytes are sent.
    assert read.collectives == {"reduce-scatter": (2, 16 + 8)}
    assert (read.waiting, read.beside) == (64 + 32, 0)


GPU = """
%condition (p: (s32[])) -> pred[] {
  %param = s32[] parameter(0)
}

%wrapped (q: bf16[8]) -> bf16[8] {
  ROOT %exchanged = bf16[8]{0} all-to-all(%q), channel_id=9
}

%body (p: (s32[])) -> (s32[]) {
  %all-gather-start = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%w), channel_id=1, dimensions={0}, backend_config={"collective_backend_config":{"is_sync":false}}
  %all-gather-done = bf16[16,8]{1,0} all-gather-done(%all-gather-start)
  %reduce-scatter-start = ((bf16[16,8]{1,0}, f32[8]{0}), (bf16[4,8]{1,0}, f32[2]{0})) reduce-scatter-start(%g, %n), channel_id=2, to_apply=%add, backend_config={"collective_backend_config":{"is_sync":true}}
  %g = bf16[16,8]{1,0} fusion(%all-gather-done), calls=%fused
  %n = f32[8]{0} fusion(%all-gather-done), calls=%fused
  %all-reduce-start = bf16[4]{0} all-reduce-start(%s), to_apply=%add, backend_config={"collective_backend_config":{"is_sync":true}}
}

ENTRY %main (p: f32[]) -> f32[] {
  %loop = (s32[]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"},"known_init_step":{"init":"0","step":"1"}}
  %async-start = ((bf16[8]{0}), bf16[8]{0}) async-start(%t), calls=%wrapped
}
"""  # noqa: E501 - as the compiler writes it


def test_loops_and_starts_of_gpus():
    read = hlo.read(GPU)
    assert read.collectives == {
        "all-gather": (12, 12 * 256),
        "reduce-scatter": (12, 12 * (64 + 8)),
        "all-reduce": (12, 12 * 8),
        "all-to-all": (1, 16),
    }
    # Sent: of a gather its result, of a scatter its operands, of a sum its result twice.
    assert read.beside == 12 * 256 + 16
    assert read.waiting == 12 * (256 + 32) + 12 * 2 * 8


def test_sums_that_sparse_cores_make_are_beside_other_work():
    text = """
%called.9 (p: f32[64,32]) -> f32[64,32] {
  %p = f32[64,32]{1,0} parameter(0)
  ROOT %all-reduce.1 = f32[64,32]{1,0} all-reduce(%p), channel_id=1, to_apply=%sum
}, execution_thread="sparsecore"

%async_computation (p: f32[64,32]) -> f32[64,32] {
  %p = f32[64,32]{1,0} parameter(0)
  ROOT %custom-call.2 = f32[64,32]{1,0} custom-call(%p), called_computations={%called.9}
}, execution_thread="sparsecore"

ENTRY %main (x: f32[64,32]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %start = ((f32[64,32]), f32[64,32]) async-start(%x), calls=%async_computation
  ROOT %done = f32[64,32]{1,0} async-done(%start), calls=%async_computation
}
"""
    found = hlo.read(text)
    assert found.collectives == {"all-reduce": (1, 64 * 32 * 4)}
    assert found.waiting == 0 and found.beside == 2 * 64 * 32 * 4
