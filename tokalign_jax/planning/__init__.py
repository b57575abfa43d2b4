"""Resources of a run from configs and shapes alone: memory, disk, FLOPs and time.

`machine` describes the devices and how fast they train. `memory` (training stages), `inference`
(memory of the others), `disk` and `flops` are the models. `resolve` replaces `auto` in a stage's
settings, `advice` says what would fit where a stage does not, and `report` puts all of it together
for `tokalign plan`.

B batch, T length, D model, V vocabulary, N heads, H head size, L layers, F intermediate.
"""
