-- Balancedness of experts spread over devices, by layer.
--
-- One row per trace and layer: the experts are dealt to devices in blocks of consecutive ids, without replicas, and the
-- tokens that each device computes are summed over the trace. Balancedness is their mean over their maximum, as DeepSeek's
-- EPLB and SGLang report it: 1 is even, 1 / devices is all on one. What an engine reports for one step is lower.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- param devices INTEGER = 8: devices that share a layer's experts
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the tokens lie in
-- column layer INTEGER: layer number of the model
-- column devices INTEGER: devices that share the layer's experts, at most N
-- column balancedness DOUBLE: mean load of a device / largest load [fraction]
-- column busiest INTEGER: device with the largest load, from 0; ties go to the lower one
-- column busiest_share DOUBLE: its share of the layer's load [fraction]
with scope as (
    select trace, coalesce(getvariable('phase'), default_phase) as phase, num_experts, top_k, least(num_experts, coalesce(getvariable('devices'), 8)) as devices
    from traces
    where trace = coalesce(getvariable('trace'), trace)
),
loads as (
    select s.trace, s.phase, a.layer, s.devices, a.expert::bigint * s.devices // s.num_experts as device, count(*) as n
    from activations as a
    join scope as s on a.trace = s.trace and (s.phase = 'all' or a.phase = s.phase)
    group by s.trace, s.phase, a.layer, s.devices, device
)
select
    trace,
    phase,
    layer::integer as layer,
    devices::integer as devices,
    sum(n) / devices / max(n) as balancedness,
    arg_min(device, (-n::bigint, device))::integer as busiest,
    max(n) / sum(n) as busiest_share
from loads
group by trace, phase, layer, devices
order by trace, layer;
