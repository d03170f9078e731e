"""The row of the selector ``norm``. It needs no torch, so predictions read it on any machine."""

from trio_edge.trio.methods import StageMethod

NORM = StageMethod(
    name="norm",
    summary="largest hidden states",
    selector="norm_selector.norm:Norm",
    positions="preserved",
    layers=((2,), (1,)),
    repeats="nothing",
    flops=lambda _decoder, _schedule, _sizes: 0.0,
)
